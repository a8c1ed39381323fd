/* libcudnn.so.9: convolutions through the backend interface, as plans that take no workspace. What cuDNN takes on a
   GPU is therefore missing from figures of memory. Numbers are those of cudnn_graph.h. */
#include "record.h"
#include <stdint.h>
#include <stdlib.h>

enum { EXECUTION_PLAN = 5 };                           /* of descriptors */
enum { INT64 = 3, HANDLE = 0, POINTER = 6, BACKEND_DESCRIPTOR = 15 }; /* of attributes */
enum { ENGINE_KNOBS = 1302, ENGINE_NOTES = 1306 };     /* lists that an engine tells of itself: empty */

typedef struct { int kind; char rest[252]; } Descriptor;

int cudnnCreate(void **handle) { *handle = (void *)0x21; return 0; }
size_t cudnnGetVersion(void) { return 91400; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int status) { (void)status; return "a status of the stub"; }
void cudnnGetLastErrorString(char *message, size_t size) { if (size) *message = 0; }

int cudnnBackendCreateDescriptor(int kind, void **descriptor) {
    Descriptor *made = calloc(1, sizeof *made);
    made->kind = kind;
    *descriptor = made;
    return 0;
}
int cudnnBackendDestroyDescriptor(void) { return 0; } /* leaked: tests are short, and handles are copied */
int cudnnBackendSetAttribute(void) { return 0; }
int cudnnBackendFinalize(Descriptor *descriptor) {
    if (descriptor->kind == EXECUTION_PLAN) stub_record("plan", "", 0);
    return 0;
}
int cudnnBackendExecute(void) { stub_launch("cudnnBackendExecute"); return 0; }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t most, int64_t *count, void *values) {
    (void)descriptor, (void)most;
    int empty = name >= ENGINE_KNOBS && name <= ENGINE_NOTES;
    if (count) *count = !empty;
    if (empty || !values) return 0;
    if (type == INT64) *(int64_t *)values = 0;
    else if (type != BACKEND_DESCRIPTOR && type != HANDLE && type != POINTER) *(int32_t *)values = 0;
    return 0;
}

#define NOTHING(name) int name(void) { return 0; }
#define KERNEL(name) int name(void) { stub_launch(#name); return 0; }
#define CREATE(name) int name(void **descriptor) { *descriptor = calloc(1, 256); return 0; }
KERNEL(cudnnActivationForward)
KERNEL(cudnnAddTensor)
KERNEL(cudnnBatchNormalizationForwardInference)
KERNEL(cudnnBatchNormalizationForwardTraining)
KERNEL(cudnnConvolutionBiasActivationForward)
KERNEL(cudnnConvolutionForward)
KERNEL(cudnnLRNCrossChannelForward)
KERNEL(cudnnPoolingForward)
KERNEL(cudnnRNNForward)
KERNEL(cudnnReduceTensor)
KERNEL(cudnnSoftmaxForward)
CREATE(cudnnCreateActivationDescriptor)
CREATE(cudnnCreateConvolutionDescriptor)
CREATE(cudnnCreateDropoutDescriptor)
CREATE(cudnnCreateFilterDescriptor)
CREATE(cudnnCreateLRNDescriptor)
CREATE(cudnnCreatePoolingDescriptor)
CREATE(cudnnCreateRNNDataDescriptor)
CREATE(cudnnCreateRNNDescriptor)
CREATE(cudnnCreateReduceTensorDescriptor)
CREATE(cudnnCreateTensorDescriptor)
NOTHING(cudnnDeriveBNTensorDescriptor)
NOTHING(cudnnDestroy)
NOTHING(cudnnDestroyActivationDescriptor)
NOTHING(cudnnDestroyConvolutionDescriptor)
NOTHING(cudnnDestroyDropoutDescriptor)
NOTHING(cudnnDestroyFilterDescriptor)
NOTHING(cudnnDestroyLRNDescriptor)
NOTHING(cudnnDestroyPoolingDescriptor)
NOTHING(cudnnDestroyRNNDataDescriptor)
NOTHING(cudnnDestroyRNNDescriptor)
NOTHING(cudnnDestroyReduceTensorDescriptor)
NOTHING(cudnnDestroyTensorDescriptor)
NOTHING(cudnnDropoutGetStatesSize)
NOTHING(cudnnFindConvolutionForwardAlgorithmEx)
NOTHING(cudnnGetConvolutionForwardAlgorithm_v7)
NOTHING(cudnnGetConvolutionForwardWorkspaceSize)
NOTHING(cudnnGetRNNTempSpaceSizes)
NOTHING(cudnnGetRNNWeightParams)
NOTHING(cudnnGetReductionIndicesSize)
NOTHING(cudnnGetReductionWorkspaceSize)
NOTHING(cudnnGetStream)
NOTHING(cudnnGetTensorNdDescriptor)
NOTHING(cudnnSetActivationDescriptor)
NOTHING(cudnnSetConvolutionGroupCount)
NOTHING(cudnnSetConvolutionMathType)
NOTHING(cudnnSetConvolutionNdDescriptor)
NOTHING(cudnnSetDropoutDescriptor)
NOTHING(cudnnSetFilterNdDescriptor)
NOTHING(cudnnSetLRNDescriptor)
NOTHING(cudnnSetPoolingNdDescriptor)
NOTHING(cudnnSetRNNDataDescriptor)
NOTHING(cudnnSetRNNDescriptor_v8)
NOTHING(cudnnSetReduceTensorDescriptor)
NOTHING(cudnnSetStream)
NOTHING(cudnnSetTensorNdDescriptor)
