// The operators, of float32 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const Operations f32_operations = operations<float>();
}
