// A device named "cuda" for a CPU build of torch. Its memory is the host's, and the CPU's kernels compute on it.
//
// What a program does wrong on a GPU is wrong here, too: tensors of two devices in one operation, a generator of the
// other device, memory beyond a limit, memory that is read before it is written. And what makes the host wait for a GPU
// is reported as it happens. Speed, the kernels' own numbers, streams and their order cannot be seen here.
//
// The file has three parts: memory, what torch asks about a device, and operations. `device.py` loads it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

const c10::Device DEVICE(c10::kCUDA, 0);

// Memory --------------------------------------------------------------------------------------------------------------

constexpr size_t BLOCK = 512;  // torch's allocator on CUDA rounds each block up to a multiple of this
constexpr size_t LINE = 64;    // bytes of a cache line

std::atomic<int64_t> used{0}, peak{0}, limit{0};
std::atomic<bool> poisons{false};

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// A block's size lies one cache line before the block.
int64_t& size_of(void* block) { return *reinterpret_cast<int64_t*>(static_cast<char*>(block) - LINE); }

void free_block(void* block) {
  if (block == nullptr) return;
  used -= size_of(block);
  std::free(static_cast<char*>(block) - LINE);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &free_block, DEVICE};
    const auto size = static_cast<int64_t>(rounded(bytes, BLOCK));
    const int64_t now = used += size;
    if (limit > 0 && now > limit) {
      used -= size;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes; ", used.load(),
                       " of ", limit.load(), " are in use (emulated device).");
    }
    for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {}
    char* start = static_cast<char*>(std::aligned_alloc(LINE, LINE + size));
    TORCH_CHECK(start != nullptr, "the host's memory ran out under the emulated device");
    void* block = start + LINE;
    size_of(block) = size;
    if (poisons) std::memset(block, 0xFF, size);  // NaN in every floating point type, -1 in integers
    return {block, block, &free_block, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = used.load(); }
};
DeviceMemory device_memory;

// Pinned memory is plain memory whose addresses are listed: only from it can a GPU copy while the host goes on.
std::mutex pinned_lock;
std::map<uintptr_t, size_t> pinned;  // start -> bytes

void free_pinned(void* block) {
  {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(reinterpret_cast<uintptr_t>(block));
  }
  std::free(block);
}

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto after = pinned.upper_bound(at);
  return after != pinned.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = rounded(std::max<size_t>(bytes, 1), LINE);
    void* block = std::aligned_alloc(LINE, size);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[reinterpret_cast<uintptr_t>(block)] = size;
    return {block, block, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

// What makes the host wait --------------------------------------------------------------------------------------------

void (*on_wait)(const char*) = nullptr;
std::atomic<bool> waits_fail{false};

void report_wait(const std::string& what) {
  if (on_wait != nullptr) on_wait(what.c_str());
  TORCH_CHECK(!waits_fail, "called a synchronizing CUDA operation: ", what);
}

// Random numbers ------------------------------------------------------------------------------------------------------

// The device's generator: a CPU generator that says it is of the device, so that one of the other device is noticed.
struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(uint64_t seed) : at::CPUGeneratorImpl(seed), inner(at::detail::createCPUGenerator(seed)) {
    device_ = DEVICE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  at::Generator inner;  // the kernels of the CPU draw from it
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<DeviceGenerator>(c10::default_rng_seed_val);
  return generator;
}

// What torch asks about a device --------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return only_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only_stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return only_stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool = false) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only_stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { report_wait("synchronize"); }
  void synchronizeEvent(void*) const override { report_wait("synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { report_wait("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
};

// torch looks it up by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  void deviceSynchronize(c10::DeviceIndex) const override { report_wait("synchronize"); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex = -1) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex = -1) const override {
    return at::make_generator<DeviceGenerator>(c10::default_rng_seed_val);
  }
};

// Operations ----------------------------------------------------------------------------------------------------------

// A CPU tensor over the memory of a device tensor. The device tensor must outlive it.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto options = tensor.options().device(c10::kCPU).pinned_memory(std::nullopt);
  at::Tensor host = tensor.numel() == 0 ? at::empty_strided(tensor.sizes(), tensor.strides(), options)
                                        : at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(),
                                                        tensor.strides(), options);
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
  return host;
}

// A device tensor with the content of a CPU tensor.
at::Tensor on_device(const at::Tensor& host) {
  if (!host.defined() || !host.is_cpu()) return host;
  at::Tensor dense = host.layout() == c10::kStrided ? host : host.to_dense();
  if (!dense.is_non_overlapping_and_dense()) dense = dense.contiguous();
  at::Tensor tensor = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(DEVICE));
  if (dense.numel() > 0) std::memcpy(tensor.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
  return tensor;
}

// Operations in which CUDA's kernels, too, take a CPU tensor that has dimensions.
const std::set<std::string> TAKES_HOST_TENSORS{"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                               "aten::_fused_adamw_"};
// Operations in which they refuse even a CPU tensor without dimensions.
const std::set<std::string> REFUSES_HOST_NUMBERS{"aten::cat", "aten::stack"};

// One call of an operation: `swap` takes its arguments to the host, `back` its results to the device.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : schema_(op.schema()), name_(schema_.name()) {
    waits_ = op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output);
  }

  at::Tensor swap(const at::Tensor& tensor, bool is_written) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      has_host_tensor_ |= tensor.dim() > 0 || REFUSES_HOST_NUMBERS.count(name_) > 0;
      if (name_.rfind("aten::index", 0) == 0 && tensor.dim() > 0) waits_ = true;  // it is copied to the device
      return tensor;
    }
    has_device_tensor_ = true;
    for (const Swapped& known : swapped_)
      if (known.device.is_same(tensor)) return known.host;
    swapped_.push_back({tensor, on_host(tensor), is_written});
    return swapped_.back().host;
  }

  c10::IValue swap(const c10::IValue& value, bool is_written) {
    if (value.isTensor()) return swap(value.toTensor(), is_written);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(swap(tensor, is_written));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        // A mask as an index: its number of ones is a shape.
        if (tensor && (tensor->scalar_type() == at::kBool || tensor->scalar_type() == at::kByte)) waits_ = true;
        list.push_back(tensor ? std::optional<at::Tensor>(swap(*tensor, is_written)) : std::nullopt);
      }
      return list;
    }
    if (value.isGenerator()) {
      at::Generator generator = value.toGenerator();
      auto* ours = dynamic_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl());
      if (ours != nullptr) return ours->inner;
      has_host_generator_ = true;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
    return value;
  }

  // Before the CPU's kernel runs: what a GPU would refuse is refused, and a wait is reported.
  void check() const {
    TORCH_CHECK(!(has_device_tensor_ && has_host_tensor_) || TAKES_HOST_TENSORS.count(name_) > 0,
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name_,
                ")");
    TORCH_CHECK(!has_host_generator_, "Expected a 'cuda' device type for generator but found 'cpu' (", name_, ")");
    if (waits_) report_wait(name_);
  }

  // Outputs that the kernel has given another shape.
  void resize_written() const {
    for (const Swapped& known : swapped_)
      if (known.is_written && known.host.sizes() != known.device.sizes()) {
        known.device.resize_(known.host.sizes());
        on_host(known.device).copy_(known.host);
      }
  }

  at::Tensor back(const at::Tensor& tensor, bool is_view) const {
    if (!tensor.defined()) return tensor;
    for (const Swapped& known : swapped_)
      if (known.host.is_same(tensor)) return known.device;
    TORCH_CHECK(!is_view, "the emulated device has no kernel for ", name_, ", which returns a view");
    return on_device(tensor);
  }

  c10::IValue back(const c10::IValue& value, bool is_view) const {
    if (value.isTensor()) return back(value.toTensor(), is_view);
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(back(tensor, is_view));
    return list;
  }

 private:
  struct Swapped {
    at::Tensor device, host;
    bool is_written;
  };
  const c10::FunctionSchema& schema_;
  const std::string name_;
  std::vector<Swapped> swapped_;
  bool waits_ = false, has_device_tensor_ = false, has_host_tensor_ = false, has_host_generator_ = false;
};

bool writes(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Every operation without a kernel below: the CPU's kernel, on the host's view of the arguments.
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto& returns = op.schema().returns();
  Call call(op);
  const size_t first = stack->size() - arguments.size();
  const std::vector<c10::IValue> kept(stack->begin() + first, stack->end());  // keeps the device tensors alive
  for (size_t i = 0; i < arguments.size(); i++) (*stack)[first + i] = call.swap(kept[i], writes(arguments[i]));
  call.check();
  op.callBoxed(stack);
  call.resize_written();
  const size_t out = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); i++) {
    const bool is_view = returns[i].alias_info() != nullptr && !returns[i].alias_info()->isWrite();
    (*stack)[out + i] = call.back(c10::IValue((*stack)[out + i]), is_view);
  }
}

// Kernels that the device must have itself: they make tensors, views and copies.

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

// The host waits for a copy that blocks, and for one between the device and memory that is not pinned.
at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  const bool crosses = to.is_cuda() != from.is_cuda();
  if (crosses && to.numel() > 0) {
    const at::Tensor& host = to.is_cuda() ? from : to;
    const std::string way = to.is_cuda() ? "copy to the device" : "copy to the host";
    if (!non_blocking) report_wait(way);
    else if (!is_pinned(host.const_data_ptr())) report_wait(way + ", not pinned");
  }
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  copy(target, from, non_blocking);
  return to;
}

at::Scalar item(const at::Tensor& tensor) {
  report_wait("item");
  return on_host(tensor).item();
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_view(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                     c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, storage, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  const auto items = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, storage, 0, {items}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& other) {
  return at::native::set_storage_cpu_(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

bool tensor_is_pinned(const at::Tensor& self, std::optional<at::Device>) { return is_pinned(self.const_data_ptr()); }

auto boxed() { return torch::CppFunction::makeFromBoxedFunction<&on_cpu>(); }

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(boxed()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy);
  library.impl("_copy_from", copy_from);
  library.impl("_local_scalar_dense", item);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_view);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  // Without a kernel of the device torch would compute these from smaller operations, with more memory than a GPU takes.
  for (const char* name : {"convolution", "convolution_backward", "native_group_norm", "native_layer_norm", "silu_backward"})
    library.impl(name, boxed());
}

extern "C" {
int64_t emulated_used() { return used; }
int64_t emulated_peak() { return peak; }
void emulated_reset_peak() { peak = used.load(); }
void emulated_set_limit(int64_t bytes) { limit = bytes; }  // 0 is no limit
void emulated_set_poison(bool is_on) { poisons = is_on; }
void emulated_set_waits_fail(bool is_on) { waits_fail = is_on; }
void emulated_on_wait(void (*report)(const char*)) { on_wait = report; }
void emulated_seed(uint64_t seed) { at::Generator(default_generator()).set_current_seed(seed); }
}

static const bool is_registered = [] {
  c10::SetAllocator(c10::kCUDA, &device_memory, 1);
  return true;
}();
