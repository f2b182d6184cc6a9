// bfloat16 operands, on tensor cores.
#include "operations.cuh"

namespace gistops::cuda {
const Operations bf16_operations = operations<Mma16<bf16>>();
}
