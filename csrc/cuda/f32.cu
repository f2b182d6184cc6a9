// float32 operands, in full precision.
#include "operations.cuh"

namespace gistops::cuda {
const Operations f32_operations = operations<Fma<float>>();
}
