// float16 operands, on tensor cores.
#include "operations.cuh"

namespace gistops::cuda {
const Operations f16_operations = operations<Mma16<f16>>();
}
