// The ops for bfloat16 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const OpTable bf16_ops = make_op_table<bf16>();
}
