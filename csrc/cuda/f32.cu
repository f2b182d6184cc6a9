// The ops for float32 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const OpTable f32_ops = make_op_table<float>();
}
