// The operators around PyTorch's products, of float16 operands.
#include "product_operations.cuh"

namespace gistops::cuda {
const ProductOperations f16_products = product_operations<f16>();
}
