// The operators around PyTorch's products, of float64 operands.
#include "product_operations.cuh"

namespace gistops::cuda {
const ProductOperations f64_products = product_operations<double>();
}
