// The operators, of float64 operands.
#include "op_table.cuh"

namespace gistops::cuda {
const Operations f64_operations = operations<double>();
}
