// The operators, of float32 operands.
#include "operations.cuh"

namespace gistops::cuda {
const Operations f32_operations = operations<float>();
}
