/* libcublas.so.13: each product is one kernel. */
#include "record.h"

#define PRODUCT(name) int name(void) { stub_launch(#name); return 0; }
#define NOTHING(name) int name(void) { return 0; }

int cublasCreate_v2(void **handle) { *handle = (void *)0x11; return 0; }
const char *cublasGetStatusName(int status) { (void)status; return "a status of the stub"; }
const char *cublasGetStatusString(int status) { (void)status; return "a status of the stub"; }
NOTHING(cublasDestroy_v2)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetMathMode)
int cublasGetMathMode(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgeam)
PRODUCT(cublasDgeam)
PRODUCT(cublasSscal_v2)
PRODUCT(cublasScopy_v2)
PRODUCT(cublasDcopy_v2)
PRODUCT(cublasSgetrfBatched)
PRODUCT(cublasSgetriBatched)
PRODUCT(cublasDgetrfBatched)
PRODUCT(cublasDgetriBatched)
