// The operators around PyTorch's products, of float32 operands.
#include "product_operations.cuh"

namespace gistops::cuda {
const ProductOperations f32_products = product_operations<float>();
}
