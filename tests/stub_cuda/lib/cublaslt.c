/* libcublasLt.so.13: it offers no algorithm, as for shapes that it has none for, so ONNX Runtime asks cuBLAS. */
#include "record.h"

#define NOTHING(name) int name(void) { return 0; }
enum { NOT_SUPPORTED = 15 };

int cublasLtCreate(void **handle) { *handle = (void *)0x12; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void) { return NOT_SUPPORTED; }
int cublasLtMatmul(void) { stub_launch("cublasLtMatmul"); return 0; }
int cublasLtMatrixTransform(void) { stub_launch("cublasLtMatrixTransform"); return 0; }
NOTHING(cublasLtDestroy)
NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulAlgoInit)
NOTHING(cublasLtMatmulDescCreate)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceCreate)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutCreate)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatrixTransformDescCreate)
NOTHING(cublasLtMatrixTransformDescDestroy)
