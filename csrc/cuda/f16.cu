// The operators, of float16 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const Operations f16_operations = operations<f16>();
}
