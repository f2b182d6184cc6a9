// The ops for float64 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const OpTable f64_ops = make_op_table<double>();
}
