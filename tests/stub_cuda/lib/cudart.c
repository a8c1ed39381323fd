/* A stand-in for libcudart.so.13 on a machine without a GPU, for ONNX Runtime's CUDA execution provider.

   Device memory is host memory, kernels do nothing, and everything is done at once: so nothing of numbers, of time or
   of races shows here. What shows is what ONNX Runtime asks for: memory, copies, kernels by name, synchronisation, and
   what of these falls into a capture. Structures and numbers are those of CUDA 13's driver_types.h; only the fields
   that are read are filled. */
#define _GNU_SOURCE
#include "record.h"
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

typedef int Status;
typedef void *Handle;
typedef struct { unsigned x, y, z; } dim3;
enum { SUCCESS = 0, OUT_OF_MEMORY = 2, ILLEGAL_STATE = 401, NOT_IN_CAPTURE = 900, CAPTURE_INVALIDATED = 901 };
enum { TO_DEVICE = 1 };
enum { MULTIPROCESSORS = 132, SHARED_OPT_IN = 232448 };
static const size_t TOTAL = (size_t)139 << 30; /* an H200's memory */

/* ---- The record ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *record_file;
static int capture; /* the number of the open capture; 0: none */
static int broken;  /* whether it was invalidated */

static void write_record(const char *what, const char *name, size_t number) {
    if (!record_file && getenv("STUB_CUDA_RECORD")) record_file = fopen(getenv("STUB_CUDA_RECORD"), "a");
    if (record_file)
        fprintf(record_file, "{\"what\": \"%s\", \"name\": \"%s\", \"number\": %zu, \"capture\": %d}\n", what, name,
                number, capture);
}
void stub_record(const char *what, const char *name, size_t number) {
    pthread_mutex_lock(&lock);
    write_record(what, name, number);
    pthread_mutex_unlock(&lock);
}
void stub_launch(const char *name) { stub_record("kernel", name, 0); }
/* Let a test mark where it is, and read what was recorded until there. */
void stub_mark(const char *name) {
    stub_record("mark", name, 0);
    if (record_file) fflush(record_file);
}

/* What CUDA refuses while a capture is open in global mode: it invalidates the capture. */
static Status not_in_capture(const char *what, const char *name, size_t number) {
    stub_record(what, name, number);
    if (!capture) return SUCCESS;
    broken = 1;
    return NOT_IN_CAPTURE;
}

/* ---- The device ---- */

Status cudaSetDevice(int device) { return device; }
Status cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
Status cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
Status cudaDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Status cudaRuntimeGetVersion(int *version) { *version = 13000; return SUCCESS; }
Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return SUCCESS; }
Status cudaDeviceSynchronize(void) { return not_in_capture("sync", "device", 0); }

Status cudaGetDeviceProperties(char *properties, int device) { /* an H200: compute capability 9.0 */
    (void)device;
    memset(properties, 0, 1008);
    strcpy(properties, "Stub H200");
#define FIELD(type, offset) (*(type *)(properties + (offset)))
    FIELD(size_t, 288) = TOTAL;
    FIELD(size_t, 296) = 49152;         /* sharedMemPerBlock */
    FIELD(int, 304) = 65536;            /* regsPerBlock */
    FIELD(int, 308) = 32;               /* warpSize */
    FIELD(int, 320) = 1024;             /* maxThreadsPerBlock */
    FIELD(int, 324) = FIELD(int, 328) = 1024;
    FIELD(int, 332) = 64;               /* maxThreadsDim */
    FIELD(int, 336) = 0x7fffffff;
    FIELD(int, 340) = FIELD(int, 344) = 65535; /* maxGridSize */
    FIELD(int, 360) = 9;                /* major */
    FIELD(int, 384) = MULTIPROCESSORS;
    FIELD(int, 596) = 50 << 20;         /* l2CacheSize */
    FIELD(int, 604) = 2048;             /* maxThreadsPerMultiProcessor */
    FIELD(size_t, 624) = 233472;        /* sharedMemPerMultiprocessor */
    FIELD(size_t, 672) = SHARED_OPT_IN; /* sharedMemPerBlockOptin */
    return SUCCESS;
}
Status cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 16: *value = MULTIPROCESSORS; break;
    case 75: *value = 9; break;             /* major */
    case 76: *value = 0; break;             /* minor */
    case 97: *value = SHARED_OPT_IN; break;
    default: *value = 1;                    /* the others that are asked for are features: present */
    }
    return SUCCESS;
}
const char *cudaGetErrorName(Status status) { (void)status; return "cudaErrorOfTheStub"; }
const char *cudaGetErrorString(Status status) { (void)status; return "an error of the stub"; }
Status cudaGetLastError(void) { return SUCCESS; }
Status cudaPeekAtLastError(void) { return SUCCESS; }

/* ---- Memory: a list of the blocks in use, the latest first ---- */

typedef struct Block { char *start; size_t size; int pinned; struct Block *next; } Block;
static Block *blocks;
static size_t used; /* bytes of device memory */

static Status allocate(void **address, size_t size, int pinned) {
    size_t whole = size ? size : 1;
    /* Pages are taken when they are touched, so gigabytes cost nothing. */
    char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    Block *block = malloc(sizeof *block);
    *block = (Block){start, whole, pinned, blocks};
    blocks = block;
    if (!pinned) used += size;
    pthread_mutex_unlock(&lock);
    *address = start;
    return SUCCESS;
}
static Status release(const char *kind, void *address) {
    if (!address) return SUCCESS;
    pthread_mutex_lock(&lock);
    Block **at = &blocks;
    while (*at && (*at)->start != address) at = &(*at)->next;
    Block *block = *at;
    size_t size = block ? block->size : 0;
    if (block) {
        *at = block->next;
        if (!block->pinned) used -= size;
        munmap(block->start, size);
        free(block);
    }
    pthread_mutex_unlock(&lock);
    return not_in_capture("free", kind, size);
}
static const char *kind_of(const void *address) {
    const char *kind = "pageable";
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block; block = block->next)
        if ((const char *)address >= block->start && (const char *)address < block->start + block->size)
            kind = block->pinned ? "pinned" : "device";
    pthread_mutex_unlock(&lock);
    return kind;
}

Status cudaMalloc(void **address, size_t size) {
    Status refused = not_in_capture("allocate", "device", size);
    return refused ? refused : used + size > TOTAL ? OUT_OF_MEMORY : allocate(address, size, 0);
}
Status cudaMallocHost(void **address, size_t size) {
    Status refused = not_in_capture("allocate", "pinned", size);
    return refused ? refused : allocate(address, size, 1);
}
Status cudaHostAlloc(void **address, size_t size, unsigned flags) { (void)flags; return cudaMallocHost(address, size); }
Status cudaFree(void *address) { return release("device", address); }
Status cudaFreeHost(void *address) { return release("pinned", address); }
Status cudaFreeAsync(void *address, Handle stream) { (void)stream; return release("device", address); }
Status cudaMallocFromPoolAsync(void **address, size_t size, Handle pool, Handle stream) {
    (void)pool, (void)stream;
    return cudaMalloc(address, size);
}
Status cudaMemGetInfo(size_t *available, size_t *total) { *available = TOTAL - used; *total = TOTAL; return SUCCESS; }
Status cudaPointerGetAttributes(void *attributes, const void *address) {
    struct { int type, device; const void *on_device, *on_host; long reserved[8]; } *given = attributes;
    memset(given, 0, sizeof *given);
    const char *kind = kind_of(address);
    given->type = *kind == 'd' ? 2 : kind[1] == 'i' ? 1 : 0; /* device, pinned, unregistered */
    given->on_device = address;
    return SUCCESS;
}

/* ---- Captured copies from the host: what the memory held, and whether it still does when the graph is launched ---- */

typedef struct Source { const void *address; size_t size; char *held; int graph; struct Source *next; } Source;
static Source *sources;

static void remember(const void *address, size_t size) {
    Source *source = malloc(sizeof *source);
    *source = (Source){address, size, malloc(size), capture, sources};
    memcpy(source->held, address, size);
    sources = source;
}
static int changed(const Source *source) {
    char *now = malloc(source->size);
    struct iovec to = {now, source->size}, from = {(void *)source->address, source->size};
    /* Not memcmp alone: what was freed may be unmapped, and reading it would end the process. */
    ssize_t read = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
    int permitted = read >= 0 || errno == EFAULT; /* some containers forbid the call */
    int differs = permitted ? read != (ssize_t)source->size || memcmp(now, source->held, source->size)
                            : memcmp(source->address, source->held, source->size);
    free(now);
    return differs != 0;
}

Status cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Handle stream) {
    (void)stream;
    const char *source = kind_of(from);
    stub_record(kind == TO_DEVICE ? "upload" : kind == 2 ? "download" : "copy", source, size);
    if (capture && *source != 'd') remember(from, size);
    memmove(to, from, size);
    return SUCCESS;
}
Status cudaMemcpy(void *to, const void *from, size_t size, int kind) { /* waits, on the default stream */
    Status refused = not_in_capture("sync", "copy", size);
    return refused ? refused : cudaMemcpyAsync(to, from, size, kind, NULL);
}
Status cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height,
                         int kind, Handle stream) {
    for (size_t row = 0; row < height; row++)
        cudaMemcpyAsync(to + row * to_pitch, from + row * from_pitch, width, kind, stream);
    return SUCCESS;
}
Status cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return SUCCESS; }
Status cudaMemsetAsync(void *to, int value, size_t size, Handle stream) {
    (void)stream;
    stub_launch("memset");
    if (value || size < 1 << 20) memset(to, value, size); /* mapped memory is zero: its pages stay untouched */
    return SUCCESS;
}
Status cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int kind) {
    (void)symbol, (void)offset, (void)kind;
    memset(to, 0, size);
    return SUCCESS;
}

/* ---- Streams and events: numbers, since all is done at once ---- */

static Handle next_handle(void) { static size_t last = 0x5000; return (Handle)(last += 16); }
Status cudaStreamCreate(Handle *stream) { *stream = next_handle(); return SUCCESS; }
Status cudaStreamCreateWithFlags(Handle *stream, unsigned flags) { (void)flags; return cudaStreamCreate(stream); }
Status cudaStreamCreateWithPriority(Handle *stream, unsigned flags, int priority) {
    (void)flags, (void)priority;
    return cudaStreamCreate(stream);
}
Status cudaStreamDestroy(Handle stream) { (void)stream; return SUCCESS; }
Status cudaStreamSynchronize(Handle stream) { (void)stream; return not_in_capture("sync", "stream", 0); }
Status cudaStreamQuery(Handle stream) { (void)stream; return not_in_capture("query", "stream", 0); }
Status cudaStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
    (void)stream, (void)event, (void)flags;
    return SUCCESS;
}
Status cudaEventCreateWithFlags(Handle *event, unsigned flags) { (void)flags; *event = next_handle(); return SUCCESS; }
Status cudaEventCreate(Handle *event) { return cudaEventCreateWithFlags(event, 0); }
Status cudaEventDestroy(Handle event) { (void)event; return SUCCESS; }
Status cudaEventRecord(Handle event, Handle stream) { (void)event, (void)stream; return SUCCESS; }
Status cudaEventRecordWithFlags(Handle event, Handle stream, unsigned flags) {
    (void)flags;
    return cudaEventRecord(event, stream);
}
Status cudaEventQuery(Handle event) { (void)event; return not_in_capture("query", "event", 0); }
Status cudaEventSynchronize(Handle event) { (void)event; return not_in_capture("sync", "event", 0); }
Status cudaEventElapsedTime(float *milliseconds, Handle from, Handle to) {
    (void)from, (void)to;
    *milliseconds = 1;
    return SUCCESS;
}
Status cudaLaunchHostFunc(Handle stream, void (*function)(void *), void *argument) {
    (void)stream;
    stub_record("host function", "", 0);
    function(argument);
    return SUCCESS;
}

/* ---- Captures and graphs: a graph is the number of its capture ---- */

static int captures;
Status cudaStreamBeginCapture(Handle stream, int mode) {
    (void)stream;
    if (capture) return ILLEGAL_STATE;
    capture = ++captures;
    broken = 0;
    stub_record("begin", mode == 0 ? "global" : "local", (size_t)capture);
    return SUCCESS;
}
Status cudaStreamIsCapturing(Handle stream, int *status) {
    (void)stream;
    *status = capture ? broken ? 2 : 1 : 0;
    return SUCCESS;
}
Status cudaStreamEndCapture(Handle stream, Handle *graph) {
    (void)stream;
    *graph = NULL;
    if (!capture) return ILLEGAL_STATE;
    stub_record("end", broken ? "invalidated" : "complete", (size_t)capture);
    if (!broken) *graph = (Handle)(size_t)capture;
    capture = 0;
    return broken ? CAPTURE_INVALIDATED : SUCCESS;
}
Status cudaGraphInstantiate(Handle *executable, Handle graph, unsigned long long flags) {
    (void)flags;
    *executable = graph;
    return SUCCESS;
}
Status cudaGraphLaunch(Handle executable, Handle stream) {
    (void)stream;
    size_t stale = 0;
    for (Source *source = sources; source; source = source->next)
        if (source->graph == (int)(size_t)executable) stale += (size_t)changed(source);
    stub_record("replay", stale ? "stale" : "", (size_t)executable);
    return SUCCESS;
}
Status cudaGraphDestroy(Handle graph) { (void)graph; return SUCCESS; }
Status cudaGraphExecDestroy(Handle executable) { (void)executable; return SUCCESS; }

/* ---- Kernels: the provider registers each with its name ---- */

enum { KERNELS = 1 << 17 };
static struct { const void *function; const char *name; } kernels[KERNELS]; /* open addressing */

static size_t place_of(const void *function) {
    size_t at = ((size_t)function >> 4) % KERNELS;
    while (kernels[at].function && kernels[at].function != function) at = (at + 1) % KERNELS;
    return at;
}
void __cudaRegisterFunction(void **module, const void *function, char *device, const char *name, int limit, void *a,
                            void *b, void *c, void *d, int *e) {
    (void)module, (void)device, (void)limit, (void)a, (void)b, (void)c, (void)d, (void)e;
    kernels[place_of(function)].function = function;
    kernels[place_of(function)].name = name;
}
static Status launch(const void *function) {
    const char *name = kernels[place_of(function)].name;
    stub_launch(name ? name : "unnamed");
    return SUCCESS;
}
Status cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, Handle stream) {
    (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
    return launch(function);
}
Status __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, Handle stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
Status cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                   Handle stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}
Status cudaLaunchKernelExC(const void *configuration, const void *function, void **arguments) {
    (void)configuration, (void)arguments;
    return launch(function);
}
Status __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return SUCCESS; }
static struct { dim3 grid, block; size_t shared; Handle stream; } configuration; /* between push and pop of a launch */
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, Handle stream) {
    configuration.grid = grid, configuration.block = block;
    configuration.shared = shared, configuration.stream = stream;
    return 0;
}
Status __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, Handle *stream) {
    *grid = configuration.grid, *block = configuration.block;
    *shared = configuration.shared, *stream = configuration.stream;
    return SUCCESS;
}
void **__cudaRegisterFatBinary(void *binary) { static void *module; (void)binary; return &module; }
void __cudaRegisterFatBinaryEnd(void **module) { (void)module; }
void __cudaUnregisterFatBinary(void **module) { (void)module; }
void __cudaRegisterVar(void **module) { (void)module; }
Status cudaFuncGetAttributes(char *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, 144);
    *(int *)(attributes + 24) = 1024;                          /* maxThreadsPerBlock */
    *(int *)(attributes + 32) = *(int *)(attributes + 36) = 90; /* ptxVersion, binaryVersion */
    return SUCCESS;
}
Status cudaFuncSetAttribute(void) { return SUCCESS; }
Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_each) { *blocks_each = 2; return SUCCESS; }

/* ---- What is linked but not needed by these graphs: any answer will do ---- */

Status cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                        int *found) {
    (void)symbol, (void)version, (void)flags;
    *function = NULL;
    if (found) *found = 1; /* there is no such symbol */
    return SUCCESS;
}
Status cudaMemPoolCreate(Handle *pool) { *pool = next_handle(); return SUCCESS; }
Status cudaMemPoolDestroy(void) { return SUCCESS; }
Status cudaMemPoolGetAttribute(void) { return SUCCESS; }
Status cudaMemPoolSetAttribute(void) { return SUCCESS; }
Status cudaMemPoolTrimTo(void) { return SUCCESS; }
Status cudaLibraryLoadData(Handle *library) { *library = next_handle(); return SUCCESS; }
Status cudaLibraryGetKernel(Handle *kernel) { *kernel = next_handle(); return SUCCESS; }
Status cudaLibraryUnload(void) { return SUCCESS; }
Status cudaKernelSetAttributeForDevice(void) { return SUCCESS; }
