// The ops for float16 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const OpTable f16_ops = make_op_table<f16>();
}
