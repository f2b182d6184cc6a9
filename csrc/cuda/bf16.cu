// The operators, of bfloat16 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const Operations bf16_operations = operations<bf16>();
}
