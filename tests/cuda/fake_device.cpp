// A CUDA device that holds no data, for a build of torch without CUDA: with it FakeTensorMode makes tensors whose device
// is cuda, and autograd walks back through them. Tests then see which tensors are on the wrong device, and where the
// host would wait, without a GPU.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <Python.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>);
}

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  int getNumGPUs() const override { return 2; }
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(0); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = at::detail::createCPUGenerator(0);
    return generator;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fake_device", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_fake_device() { return PyModule_Create(&definition); }
