/* A CUDA driver that does nothing but remember: enough of one for Triton's launcher and for kernels/repeat.py. */
#include <string.h>
#include "cuda.h"

typedef void (*hook_t)(const CUlaunchConfig *, CUfunction, void **);
static hook_t hook;
void fake_set_hook(hook_t h) { hook = h; }

CUresult cuDriverGetVersion(int *v) { *v = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult r, const char **s) { *s = "fake"; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *p, CUlimit l) { *p = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *c) { *c = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int n) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *p, CUdevice_attribute a, CUdevice d) {
  *p = a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 65536;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *p, CUfunction_attribute a, CUfunction f) {
  *p = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  static char functions[1 << 12];
  static int made;
  *f = (CUfunction)(functions + ++made);
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute a, CUdeviceptr p) {
  *(CUdeviceptr *)data = p;
  return CUDA_SUCCESS;
}

/* the address first, then all that was said, in 128 bytes */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  if ((cuuint64_t)map % 64)
    return CUDA_ERROR_INVALID_VALUE;
  char *at = memset(map, 0, 128);
  cuuint32_t said[] = {type, rank, interleave, swizzle, l2, fill};
#define PUT(from, bytes) (memcpy(at, from, bytes), at += bytes)
  PUT(&address, 8);
  PUT(said, sizeof said);
  PUT(dims, 8 * rank);
  PUT(strides, 8 * (rank - 1));
  PUT(box, 4 * rank);
  PUT(element_strides, 4 * rank);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  memcpy(map, &address, 8);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  if (hook)
    hook(config, f, parameters);
  return CUDA_SUCCESS;
}
