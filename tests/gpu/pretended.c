/* A pretended H100: memory is host memory that is hardly touched, copies copy, kernels are counted.
 *
 * Preloaded in front of cudart, cuBLAS, cuDNN and the driver. What torch calls and this file does not
 * define returns 0: those functions are listed by `nm` when it is built (pretended.py).
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE ((size_t)2 << 20)         /* cudaMalloc's granularity */
#define CARD ((size_t)79 << 30)        /* memory of the card */
#define SPAN ((size_t)1 << 44)         /* addresses: none is handed out twice */
#define COPIED ((size_t)1 << 20)       /* larger copies within the card are not made */
#define OK cudaSuccess
#define API __attribute__((visibility("default")))

/* --- counts, read by pretended.py ------------------------------------------------------------ */

enum { KERNELS, TRITON, CONVOLUTIONS, CALLS, TO_CARD, TO_HOST, WAITS, COUNTS };
static unsigned long counted[COUNTS];

static void count(int what) { __atomic_add_fetch(&counted[what], 1, __ATOMIC_RELAXED); }
API void pretended_counts(unsigned long *out) { memcpy(out, counted, sizeof counted); }
API int pretended_call(void) { count(CALLS); return 0; }

/* --- the card -------------------------------------------------------------------------------- */

API cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return OK; }
API cudaError_t cudaGetDevice(int *device) { *device = 0; return OK; }
API cudaError_t cudaDriverGetVersion(int *version) { *version = CUDA_VERSION; return OK; }
API cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDA_VERSION; return OK; }
API const char *cudaGetErrorString(cudaError_t error) { return "pretended"; }
API const char *cudaGetErrorName(cudaError_t error) { return "pretended"; }

API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
    }
    return OK;
}

static int attribute(enum cudaDeviceAttr which)
{
    int value;
    cudaDeviceGetAttribute(&value, which, 0);
    return value;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *card, int device)
{
    memset(card, 0, sizeof *card);
    strcpy(card->name, "NVIDIA H100 80GB HBM3 (pretended)");
    card->totalGlobalMem = CARD;
    card->major = attribute(cudaDevAttrComputeCapabilityMajor);
    card->warpSize = attribute(cudaDevAttrWarpSize);
    card->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    card->maxThreadsPerBlock = card->maxThreadsDim[0] = card->maxThreadsDim[1] = 1024;
    card->maxThreadsDim[2] = 64;
    card->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
    card->maxGridSize[1] = card->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimY);
    card->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    card->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    card->regsPerBlock = card->regsPerMultiprocessor = 65536;
    card->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    card->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    card->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    card->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    card->textureAlignment = 512;
    card->canMapHostMemory = card->concurrentKernels = card->unifiedAddressing = 1;
    return OK;
}

/* --- memory ---------------------------------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct pool { char *start, *next; } device, pinned;
static struct { char *start; size_t bytes; } taken[1 << 16];
static size_t in_use;
static int blocks;

static void *take(struct pool *pool, size_t bytes)
{
    if (!pool->start)
        pool->start = pool->next = mmap(NULL, SPAN, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *found = pool->next;
    pool->next += bytes;
    return found;
}

static int in(const struct pool *pool, const void *p)
{
    return pool->start && (char *)p >= pool->start && (char *)p < pool->start + SPAN;
}

API cudaError_t cudaMalloc(void **p, size_t bytes)
{
    cudaError_t result = cudaErrorMemoryAllocation;
    bytes = (bytes + PAGE - 1) & ~(PAGE - 1);
    pthread_mutex_lock(&lock);
    if (in_use + bytes <= CARD) {
        *p = taken[blocks].start = take(&device, bytes);
        taken[blocks++].bytes = bytes;
        in_use += bytes;
        result = OK;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

API cudaError_t cudaFree(void *p)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < blocks; i++)
        if (p && taken[i].start == p) {
            in_use -= taken[i].bytes;
            madvise(p, taken[i].bytes, MADV_DONTNEED);
            taken[i] = taken[--blocks];
            break;
        }
    pthread_mutex_unlock(&lock);
    return OK;
}

API cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags)
{
    pthread_mutex_lock(&lock);
    *p = take(&pinned, (bytes + 4095) & ~(size_t)4095);
    pthread_mutex_unlock(&lock);
    return OK;
}

API cudaError_t cudaMemGetInfo(size_t *left, size_t *all)
{
    *all = CARD;
    *left = CARD - in_use;
    return OK;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p)
{
    memset(found, 0, sizeof *found);
    found->type = in(&device, p) ? cudaMemoryTypeDevice
                  : in(&pinned, p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->devicePointer = found->hostPointer = (void *)p;
    return OK;
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                                cudaStream_t stream)
{
    int within = in(&device, to) && in(&device, from);
    if (!within && in(&device, to)) count(TO_CARD);
    if (!within && in(&device, from)) count(TO_HOST);
    if (!within || bytes <= COPIED) memcpy(to, from, bytes);
    return OK;
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    count(WAITS);
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}

API cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    if (bytes <= COPIED) memset(p, value, bytes);
    return OK;
}

API cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream)
{
    return cudaMemset(p, value, bytes);
}

/* A variable of the device: room for the largest, which nothing reads. */
API cudaError_t cudaGetSymbolAddress(void **p, const void *symbol)
{
    static char room[1 << 20];
    *p = room;
    return OK;
}

/* --- streams and events ---------------------------------------------------------------------- */

static void *handle(void)
{
    static size_t last = 0x1000;
    return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = handle(); return OK; }
API cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return OK; }
API cudaError_t cudaEventSynchronize(cudaEvent_t e) { count(WAITS); return OK; }
API cudaError_t cudaStreamSynchronize(cudaStream_t s) { count(WAITS); return OK; }
API cudaError_t cudaDeviceSynchronize(void) { count(WAITS); return OK; }

API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    *ms = 0.01f;
    return OK;
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority)
{
    *s = handle();
    return OK;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status)
{
    *status = cudaStreamCaptureStatusNone;
    return OK;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph,
                                         const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *n)
{
    if (id) *id = 0;
    if (n) *n = 0;
    return cudaStreamIsCapturing(s, status);
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return OK;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *given)
{
    function(given);
    return OK;
}

/* --- kernels --------------------------------------------------------------------------------- */

static __thread struct { dim3 grid, block; size_t shared; void *stream; } call;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream)
{
    call.grid = grid, call.block = block, call.shared = shared, call.stream = stream;
    return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
{
    *grid = call.grid, *block = call.block, *shared = call.shared;
    *(void **)stream = call.stream;
    return OK;
}

API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f)
{
    *kernel = (cudaKernel_t)f;
    return OK;
}

API cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s)
{
    count(KERNELS);
    return OK;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **a, size_t m,
                                   cudaStream_t s)
{
    count(KERNELS);
    return OK;
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *f, void **a)
{
    count(KERNELS);
    return OK;
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *f)
{
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 64;
    found->binaryVersion = found->ptxVersion = 90;
    found->maxDynamicSharedSizeBytes = 232448;
    return OK;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f,
                                                                       int threads, size_t shared,
                                                                       unsigned flags)
{
    *n = 2;
    return OK;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads,
                                                              size_t shared)
{
    *n = 2;
    return OK;
}

/* --- cuDNN: one engine for every convolution, without a workspace; BatchNorm ------------------- */

enum { DOUBLES = 5, POINTERS = 6, INT64S = 3, DESCRIPTORS = 15 }; /* cudnnBackendAttributeType_t */
enum { NUMERICAL_NOTES = 1303, BEHAVIOR_NOTES = 1305 };           /* ... AttributeName_t */

API int cudnnBackendCreateDescriptor(int kind, void **made) { *made = handle(); return 0; }
API int cudnnBackendExecute(void *h, void *plan, void *pack) { count(CONVOLUTIONS); return 0; }

/* Asked for the number alone, `out` is NULL. Descriptors are filled in where they are. */
API int cudnnBackendGetAttribute(void *d, int name, int type, int64_t room, int64_t *n, void *out)
{
    int wide = type == DOUBLES || type == POINTERS || type == INT64S;
    int found = name != NUMERICAL_NOTES && name != BEHAVIOR_NOTES;
    if (n) *n = found;
    if (out && found && room > 0 && type != DESCRIPTORS) memset(out, 0, wide ? 8 : 4);
    return 0;
}

API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    void *h, int mode, int ops, void *x, void *z, void *y, void *p, void *a, size_t *bytes)
{
    *bytes = 0;
    return 0;
}

API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    void *h, int mode, int ops, void *x, void *y, void *dy, void *dz, void *dx, void *p, void *a,
    size_t *bytes)
{
    *bytes = 0;
    return 0;
}

API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *h, int mode, int ops, void *a,
                                                             void *x, size_t *bytes)
{
    *bytes = 0;
    return 0;
}

/* --- the driver, for Triton ------------------------------------------------------------------ */

API CUresult cuInit(unsigned flags) { return 0; }
API CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return 0; }
API CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
API CUresult cuDeviceGet(CUdevice *found, int number) { *found = 0; return 0; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = handle(); return 0; }
API CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&device; return 0; }
API CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
API CUresult cuCtxGetDevice(CUdevice *found) { *found = 0; return 0; }
API CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = handle(); return 0; }
API CUresult cuModuleLoad(CUmodule *m, const char *path) { *m = handle(); return 0; }
API CUresult cuModuleUnload(CUmodule m) { return 0; }
API CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
API CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
API CUresult cuGetErrorString(CUresult r, const char **s) { *s = "pretended"; return 0; }

/* The runtime's attributes have the driver's numbers. */
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice d)
{
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)which, 0);
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active)
{
    *flags = 0;
    *active = 1;
    return 0;
}

API CUresult cuCtxGetLimit(size_t *value, CUlimit which) { *value = 0; return 0; }

API CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status)
{
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return 0;
}

API CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name)
{
    *f = handle();
    return 0;
}

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f)
{
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return 0;
}

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p)
{
    *(CUdeviceptr *)value = p;
    return 0;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction f, void **a, void **extra)
{
    count(TRITON);
    return 0;
}

API CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned a,
                            unsigned b, unsigned c, unsigned shared, CUstream s, void **given,
                            void **extra)
{
    count(TRITON);
    return 0;
}

static CUresult nothing(void) { return 0; }

API CUresult cuGetProcAddress(const char *name, void **f, int version, cuuint64_t flags,
                              CUdriverProcAddressQueryResult *result)
{
    void *found = dlsym(RTLD_DEFAULT, name);
    *f = found ? found : (void *)nothing;
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return 0;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result)
{
    if (result) *result = cudaDriverEntryPointSuccess;
    return (cudaError_t)cuGetProcAddress(name, f, version, flags, NULL);
}
