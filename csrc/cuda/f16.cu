// The operators, of float16 operands.
#include "operations.cuh"

namespace gistops::cuda {
const Operations f16_operations = operations<f16>();
}
