"""A stand-in accelerator in plain Python, for tests on machines that have none.

Its tensors are computed on the CPU, but say that they lie on a device of their own, `standin:0`. What goes wrong on a
GPU goes wrong here as well: a forgotten `.to(device)`, a `.numpy()` without `.cpu()`, float64 where the device has
none, a step that waits for the device once for each number it prints.

    PYTHONPATH=tests python -c "import standin; standin.register(); import alpaca_ft.cli as c; c.main(['train', ...])"

After `register()`

- `torch.accelerator.is_available()` is true, `.to('standin')` moves, and accelerate puts its models on `standin:0`;
- mixing with CPU tensors is refused, apart from CPU tensors without dimensions where CUDA takes them as numbers;
- `torch.autocast('standin', dtype=torch.bfloat16)` casts down and up by CUDA's lists;
- `copies` counts what goes between host and device, and says where: see `Copies`.

`register` is for a whole process and cannot be taken back: run it in a process of its own.

What it does not show:

- several devices, streams, events, peer copies; nothing runs beside the host, so the order of two streams is untested;
- memory: every figure is 0, nothing runs out; `.pin_memory()` gives ordinary memory, and
  `torch.empty(..., pin_memory=True)` fails;
- random numbers: the device draws from the CPU's generator, so that a seed gives the numbers of the CPU, and
  `torch.Generator('standin')` is not supported; as on a GPU, a generator of the CPU is refused;
- kernels: rounding, speed and determinism are the CPU's, and attention is put together from its plain formula;
- the cache of autocast: a weight is cast each time it is used; used twice, it collects its gradients in fp32, not bf16;
- `p.data = value` with p and value on two devices is refused; a GPU takes it;
- `torch.load(map_location=...)`: tensors that were saved on the device come back on the device;
- the copies that a GPU makes inside one operation (the checks of torch.linalg, for instance) are not counted;
- torch.compile, torch.export, DLPack, sparse and quantized tensors, multi-process training.

It rests on `torch.utils.backend_registration._setup_privateuseone_for_python_backend`, torch 2.9 and later.
"""
import os
import sys
import types
from collections import OrderedDict
from copy import deepcopy
from typing import NamedTuple

import torch

NAME = 'standin'
DEVICE = f'{NAME}:0'


# ---- The count of copies

class Place(NamedTuple):
    """Where a copy was asked for: the innermost line of the stack that is not torch's."""
    direction: str  # 'to_host' or 'to_device'
    operation: str  # without 'aten::', such as '_local_scalar_dense', which is item()
    file: str  # '(backward)' in a thread of autograd, where no line of Python is at work
    line: int
    function: str

    def __str__(self):
        return f'{self.direction} {self.file}:{self.line} in {self.function} ({self.operation})'


class Copies:
    """The number of copies from device to host and from host to device since the last `reset()`.

    Each one lets a GPU's queue run dry, or may: item(), bool(), tolist(), .cpu(), printing; and also the operations
    whose result has a size that only the device knows, such as nonzero() and x[mask].
    With `where = True`, `places` is the list of their `Place`s.
    """
    def __init__(self):
        self.where = False
        self.reset()

    def reset(self):
        """Start again from nothing; `where` stays as it is."""
        self.to_host = 0
        self.to_device = 0
        self.places = []

    def count(self, direction, operation, times=1):
        """Count copies in one direction; for the device itself."""
        setattr(self, direction, getattr(self, direction) + times)
        if self.where:
            self.places += [find_place(direction, operation)]*times

    def __repr__(self):
        return f'Copies(to_host={self.to_host}, to_device={self.to_device})'


def find_place(direction, operation):
    """Walk up the stack to the first line that is neither torch's nor this file's."""
    skipped = (os.path.dirname(torch.__file__) + os.sep, __file__)
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(skipped):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.endswith(f'{os.sep}threading.py'):
        return Place(direction, operation, '(backward)', 0, '')
    return Place(direction, operation, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


copies = Copies()


# ---- The tensor

class StandinTensor(torch.Tensor):
    """A tensor on the device; `raw` is the CPU tensor that holds its numbers."""
    has_double = True  # whether the device has float64; set by register()

    @staticmethod
    def __new__(cls, raw, requires_grad=False):
        if raw.dtype == torch.float64 and not cls.has_double:
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype as the {NAME} framework doesn't support "
                            'float64. Please use float32 instead.')
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0), requires_grad=requires_grad)

    def __init__(self, raw, requires_grad=False):
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl  # results keep this class by __torch_dispatch__ alone

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    # What torch reads from memory without asking the dispatcher

    @property
    def data(self):
        """The same numbers without a graph."""
        return StandinTensor(self.raw.data)

    @data.setter
    def data(self, value):
        """torch swaps what it knows of the tensor; `raw` has to follow."""
        torch._C.TensorBase.data.__set__(self, value)
        self.raw = value.raw

    def tolist(self):
        """A copy to the host."""
        copies.count('to_host', 'tolist')
        return self.raw.tolist()

    def __repr__(self, *, tensor_contents=None):
        copies.count('to_host', 'repr')
        return f"{repr(self.raw)[:-1]}, device='{DEVICE}')"

    def __format__(self, spec):
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def numpy(self, *args, **kwargs):
        """Refused, as on a GPU."""
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                        'host memory first.')

    def data_ptr(self):
        """An address that tells two tensors apart, for those who look for shared weights."""
        return self.raw.data_ptr()

    def storage(self):
        """The storage of the numbers; see `data_ptr`."""
        return self.raw.storage()

    def untyped_storage(self):
        """The storage of the numbers; see `data_ptr`."""
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError('Only Tensors created explicitly by the user (graph leaves) support the deepcopy '
                               'protocol at the moment.')
        result = StandinTensor(self.raw.clone(), requires_grad=self.requires_grad)
        memo[id(self)] = result
        result.__dict__.update({key: deepcopy(value, memo) for key, value in self.__dict__.items() if key != 'raw'})
        if self.grad is not None:
            result.grad = deepcopy(self.grad, memo)
        return result

    def __reduce_ex__(self, protocol):
        if isinstance(self, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())
        on_host = self.detach().cpu()
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (on_host, self.dtype, DEVICE, self.requires_grad)


# ---- Operations

# They wait for the device: the host needs a number from it, often the size of the result.
WAITING = {'_local_scalar_dense', 'allclose', 'bincount', 'equal', 'masked_select', 'nonzero', 'unique_consecutive',
           'unique_dim', '_unique', '_unique2'}
INDEXING = {'index', '_unsafe_index', 'index_put', 'index_put_', '_unsafe_index_put', '_index_put_impl_'}
# CUDA takes a CPU tensor without dimensions as a number in pointwise operations, and in these.
TAKING_NUMBERS = {'fill', 'fill_', 'masked_fill', 'masked_fill_', 'index_fill', 'index_fill_', 'where', 'index_put',
                  'index_put_', '_index_put_impl_'}


def on_device(x):
    """Whether it is a tensor of the device."""
    return isinstance(x, StandinTensor)


def names_device(device):
    """Whether a `device=` means this one."""
    return device is not None and torch.device(device).type == NAME


def change(f, x):
    """`f` of a tensor, of all tensors in a list, and everything else as it is."""
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, (list, tuple)):
        return type(x)(change(f, each) for each in x)
    return x


def find_tensors(args, kwargs):
    """The tensors among the arguments, also those in lists."""
    found = []
    change(found.append, [*args, *kwargs.values()])
    return found


def to_raw(x):
    """The CPU tensor that holds the numbers."""
    return x.raw if on_device(x) else x


def run(func, args, kwargs):
    """Run one operation in which a tensor of the device takes part."""
    name = func._schema.name.removeprefix('aten::')
    if torch.is_inference_mode_enabled() and func._can_decompose():  # otherwise autograd has taken it apart already
        return func.decompose(*args, **kwargs)
    if name == 'copy_':
        return copy(*args)
    if name == '_to_copy':
        return convert(func, *args, **kwargs)
    if name == 'is_pinned':
        return False
    tensors = find_tensors(args, kwargs)
    refuse_mixing(func, name, args, tensors)
    refuse_generator(kwargs.get('generator'))
    count_waiting(func, name, args, kwargs)
    stays = True
    kwargs = dict(kwargs)
    if kwargs.get('device') is not None:  # x.new_zeros(3, device='cpu')
        stays = names_device(kwargs['device'])
        kwargs['device'] = torch.device('cpu')
    if name in ('_softmax', '_log_softmax') and args[2]:  # half_to_float, which the CPU does not have
        args = args[0].float(), args[1], False
    result = func(*change(to_raw, args), **{key: change(to_raw, value) for key, value in kwargs.items()})
    if not stays:
        return result
    given = {id(to_raw(x)): x for x in tensors if on_device(x)}  # in place and out=: the same object comes back

    def to_standin(raw):
        if id(raw) not in given:
            return StandinTensor(raw)
        x = given[id(raw)]
        if x.shape != raw.shape or x.stride() != raw.stride():  # unsqueeze_(), or out= made larger
            x.data = StandinTensor(raw)
        return x
    return change(to_standin, result)


def copy(target, source, non_blocking=False):
    """target.copy_(source), within the device or between device and host."""
    if on_device(target) != on_device(source):
        copies.count('to_device' if on_device(target) else 'to_host', 'copy_')
    to_raw(target).copy_(to_raw(source))
    return target


def convert(func, x, **kwargs):
    """x.to(...) in another dtype, memory format or to another device; `x` lies on the device."""
    stays = kwargs.get('device') is None or names_device(kwargs['device'])
    kwargs['device'] = torch.device('cpu')
    if not stays:
        copies.count('to_host', '_to_copy')
    result = func(x.raw, **kwargs)
    return StandinTensor(result) if stays else result


def refuse_mixing(func, name, args, tensors):
    """Raise torch's error where tensors of device and host meet."""
    strangers = [x for x in tensors if not on_device(x)]
    if name in INDEXING:  # indices of the host are copied to the device, if the indexed tensor lies there
        if not on_device(args[0]):
            raise RuntimeError('indices should be either on cpu or on the same device as the indexed tensor (cpu)')
        strangers = [x for x in args[2:3] if isinstance(x, torch.Tensor) and not on_device(x)]
    if torch.Tag.pointwise in func.tags or name in TAKING_NUMBERS or name.startswith('_foreach_'):
        strangers = [x for x in strangers if x.dim() > 0]
    if strangers:
        raise RuntimeError(f'Expected all tensors to be on the same device, but found at least two devices, {DEVICE} '
                           f'and {strangers[0].device}! (when checking arguments of {name})')


def refuse_generator(generator):
    """Raise torch's error for a generator of the CPU."""
    if generator is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")


def count_waiting(func, name, args, kwargs):
    """Count the copies that an operation makes inside."""
    if name in WAITING or func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get('output_size') is None:
        copies.count('to_host', name)
    if name not in INDEXING:
        return
    indices = [x for x in args[1] if x is not None]
    masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
    # x[mask] = number becomes masked_fill on CUDA. The number comes as a tensor: as CPU's there, as the device's here.
    filling = 'put' in name and len(indices) == len(masks) == 1 and args[2].numel() == 1
    if filling:
        return
    waiting = sum(on_device(x) for x in masks)
    moved = sum(not on_device(x) for x in indices)
    copies.count('to_host', name, waiting)
    copies.count('to_device', name, moved)


# ---- Creation

def make_factory(op):
    """torch.zeros(3, device='standin') and the like."""
    def factory(*args, **kwargs):
        refuse_generator(kwargs.get('generator'))
        kwargs['device'] = torch.device('cpu')
        kwargs.pop('pin_memory', None)
        return StandinTensor(op(*args, **kwargs))
    return factory


def find_factories():
    """(name, operation) for what takes a device and no tensor, and is not put together from others."""
    for full_name in torch._C._dispatch_get_all_op_names():
        space, _, name = full_name.partition('::')
        if space != 'aten' or name.startswith(('_', 'sparse_', 'from_file')):
            continue
        base, _, overload = name.partition('.')
        try:
            op = getattr(getattr(torch.ops.aten, base), overload or 'default')
        except (AttributeError, RuntimeError):  # those of TorchScript, without a schema here
            continue
        arguments = op._schema.arguments
        creates = any(a.name == 'device' for a in arguments) and not any('Tensor' in str(a.type) for a in arguments)
        if creates and not torch._C._dispatch_has_kernel_for_dispatch_key(full_name, 'CompositeImplicitAutograd'):
            yield name, op


def copy_from(source, target, non_blocking=False):
    """Inside of torch.tensor(..., device='standin'), where tensors do not come to __torch_dispatch__."""
    return copy(target, source)


def take_number(x):
    """item() inside of torch.tensor([x, y]); see `copy_from`."""
    return run(torch.ops.aten._local_scalar_dense.default, (x,), {})


def pin(x, device=None):
    """x.pin_memory() of a CPU tensor, for data loaders: ordinary memory."""
    return x.clone()


# ---- Autocast: the lists of CUDA, as they stand in ATen/autocast_mode.h

LOWER = """_convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm
    bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention""".split()
FP32 = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim
    nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss
    soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d
    upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa""".split()
FP32_RESULT = """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList""".split()
WIDEST = """addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add""".split()


def without_autocast():
    """A context for what is inside the kernels below."""
    key = torch._C.DispatchKey.AutocastPrivateUse1
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def is_castable(x):
    """Whether autocast touches a tensor: on the device, a floating point number, not float64."""
    return on_device(x) and x.is_floating_point() and x.dtype != torch.float64


def cast_arguments(dtype, args, kwargs):
    """The arguments with all castable tensors in one dtype."""
    def cast(x):
        return x.to(dtype) if is_castable(x) else x
    return change(cast, args), {key: change(cast, value) for key, value in kwargs.items()}


def make_lower(op):
    """Matrix products and convolutions: in bf16 (or fp16)."""
    def lower(*args, **kwargs):
        with without_autocast():
            args, kwargs = cast_arguments(torch.get_autocast_dtype(NAME), args, kwargs)
            return op(*args, **kwargs)
    return lower


def make_fp32(op):
    """Losses, norms and what grows fast: in fp32."""
    def fp32(*args, **kwargs):
        with without_autocast():
            args, kwargs = cast_arguments(torch.float32, args, kwargs)
            return op(*args, **kwargs)
    return fp32


def make_fp32_result(op):
    """Sums and softmax: the result in fp32, unless the caller names a dtype."""
    names = [a.name for a in op._schema.arguments]

    def fp32_result(*args, **kwargs):
        given = dict(zip(names, args)) | kwargs
        with without_autocast():
            if not is_castable(args[0]) or given.get('dtype') is not None:
                return op(*args, **kwargs)
            given.pop(names[0])
            return op(args[0], **given | dict(dtype=torch.float32))
    return fp32_result


def make_widest(op):
    """What takes several tensors of one dtype: in fp32 if one of them is."""
    def widest(*args, **kwargs):
        castable = [x.dtype for x in find_tensors(args, kwargs) if is_castable(x)]
        dtype = torch.float32 if torch.float32 in castable else torch.get_autocast_dtype(NAME)
        with without_autocast():
            args, kwargs = cast_arguments(dtype, args, kwargs)
            return op(*args, **kwargs)
    return widest


# ---- torch.standin

class DeviceContext:
    """torch.standin.device(0): there is nothing to switch."""
    def __init__(self, device=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


class Properties(NamedTuple):
    """torch.standin.get_device_properties(): no figures that could be taken for real ones."""
    name: str = NAME
    total_memory: int = 0
    multi_processor_count: int = 1
    major: int = 0
    minor: int = 0


def make_module():
    """The functions of torch.standin, as torch.cuda has them."""
    module = types.ModuleType(f'torch.{NAME}')

    def answer(value):
        return lambda *args, **kwargs: value
    answers = dict(
        is_available=True, is_initialized=True, _is_in_bad_fork=False, device_count=1, current_device=0,
        get_device_name=NAME, get_device_properties=Properties(), get_device_capability=(0, 0),
        get_amp_supported_dtype=[torch.bfloat16, torch.float16], is_bf16_supported=True)
    for name, value in answers.items():
        setattr(module, name, answer(value))
    for name in ('init', '_lazy_init', 'set_device', 'synchronize', 'empty_cache', 'manual_seed', 'manual_seed_all',
                 'reset_peak_memory_stats', 'reset_max_memory_allocated', 'ipc_collect'):
        setattr(module, name, answer(None))  # torch.manual_seed seeds the CPU's generator, which is the device's too
    for name in ('memory_allocated', 'max_memory_allocated', 'memory_reserved', 'max_memory_reserved'):
        setattr(module, name, answer(0))
    module.memory_stats = answer({})
    module.mem_get_info = module.get_memory_info = answer((0, 0))
    module.device = DeviceContext
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: torch.set_rng_state(state)
    module.get_rng_state_all = lambda: [torch.get_rng_state()]
    module.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    return module


# ---- Registration

_libraries = []  # an entry that is collected would take its operations along


def open_library(space, key):
    """A library whose entries last as long as the process."""
    library = torch.library.Library(space, 'IMPL', key)
    _libraries.append(library)
    return library


def register(
    double=True,  # whether the device has float64; False: TypeError, as with Apple's MPS
):
    """Make the device known to torch, accelerate and transformers, once for the whole process."""
    StandinTensor.has_double = double
    os.environ['ACCELERATE_TORCH_DEVICE'] = DEVICE  # accelerate looks for the devices that it knows by name
    if _libraries:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    _setup_privateuseone_for_python_backend(NAME, backend_module=make_module())
    factories = open_library('aten', 'PrivateUse1')
    for name, op in find_factories():
        factories.impl(name, make_factory(op))
    factories.impl('_copy_from', copy_from)
    factories.impl('_local_scalar_dense', take_number)
    open_library('aten', 'CPU').impl('_pin_memory', pin)
    open_library('_', 'AutocastPrivateUse1').fallback(torch.library.fallthrough_kernel)
    casts = open_library('aten', 'AutocastPrivateUse1')
    for names, make in (LOWER, make_lower), (FP32, make_fp32), (FP32_RESULT, make_fp32_result), (WIDEST, make_widest):
        for name in names:
            base, _, overload = name.partition('.')
            casts.impl(name, make(getattr(getattr(torch.ops.aten, base), overload or 'default')))
    fill_accelerator()
    allow_bf16()


def fill_accelerator():
    """torch.accelerator asks C++ for these, which has no answer for a device in Python."""
    module = getattr(torch, NAME)
    for name in ('synchronize', 'empty_cache', 'memory_allocated', 'max_memory_allocated', 'memory_reserved',
                 'max_memory_reserved', 'memory_stats', 'get_memory_info', 'reset_peak_memory_stats'):
        for space in torch.accelerator, torch.accelerator.memory:
            if hasattr(space, name):
                setattr(space, name, getattr(module, name))


def allow_bf16():
    """TrainingArguments(bf16=True) asks for devices by name as well."""
    try:
        import transformers.utils  # noqa: F401
    except ImportError:
        return
    for name in ('transformers.utils.import_utils', 'transformers.utils', 'transformers.training_args'):
        if name in sys.modules:
            sys.modules[name].is_torch_bf16_gpu_available = lambda: True
