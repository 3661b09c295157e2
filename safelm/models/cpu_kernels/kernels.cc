// All kernels as one unit: XLA's headers, which take most of the time, are read once.

#include "adamw.h"
#include "attention.h"
#include "caches.h"
#include "logits.h"
#include "matmul.h"
#include "products.h"
