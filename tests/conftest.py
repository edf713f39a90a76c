"""Options and fixtures for all tests."""

import zlib

import pytest
import routes
import toolchain
import torch

from dnl_ext._load import LEFT_OUT


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long form of the suites too")
    parser.addoption("--once", action="store_true", help="run each test function with the first of its parameters only")
    parser.addoption("--no-emulator", action="store_true", help="leave out what the emulator of CUDA kernels runs")


def is_emulated(item):
    """Whether a test builds the emulated operators."""
    device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    return not {"emulated_library", "emulated"}.isdisjoint(item.fixturenames) or device == "emulated"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--no-emulator"):
        config.hook.pytest_deselected(items=[item for item in items if is_emulated(item)])
        items[:] = [item for item in items if not is_emulated(item)]
    slow, once = config.getoption("--slow"), config.getoption("--once")
    skip = pytest.mark.skip(reason="long form; give --slow")
    seen = set()
    for item in items:
        function = item.nodeid.split("[")[0]
        emulated = "device" in item.fixturenames and item.callspec.params["device"] == "emulated"
        if "slow" in item.keywords and not slow:
            item.add_marker(skip)
        # Emulated, a test function runs once, with the first of its parameters.
        elif once or (emulated and not slow):
            if (function, emulated) in seen:
                item.add_marker(skip)
            seen.add((function, emulated))


def pytest_terminal_summary(terminalreporter):
    """One line: the tests that lacked something, and how to get it."""
    if line := toolchain.left_out(report.longrepr[2] for report in terminalreporter.getreports("skipped")):
        terminalreporter.write_line(line)


def pytest_make_parametrize_id(config, val, argname):
    """Names of dtypes in the tests' ids, so that -k finds them."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True, scope="session")
def own_tune_file(tmp_path_factory):
    """What the user's own GPU was found to prefer (dnl-ext tune) decides nothing here, and no test writes to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNL_EXT_TUNE_FILE", str(tmp_path_factory.mktemp("tune") / "paths.json"))
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These shapes are small: on a busy machine, waiting for a second thread takes ten times the work itself.

    A test of threads sets their number itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request):
    """Runs a test of operators on CPU tensors by every route there is: see routes.py."""
    if request.param == "cuda" and not routes.HAS_GPU:
        pytest.skip(toolchain.NO_GPU)
    if request.param == "emulated" and LEFT_OUT:
        pytest.skip(toolchain.WITHOUT_KERNELS)
    with routes.route(request.param, zlib.crc32(request.node.nodeid.encode())):
        yield request.param


@pytest.fixture
def allow_tf32():
    """A function that says whether float32 products on a GPU may use TF32, until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    yield lambda allowed: setattr(matmul, "allow_tf32", allowed)
    matmul.allow_tf32 = before


@pytest.fixture(scope="session")
def emulated_library():
    """The emulated CUDA operators, as torch.ops.dnl_cuda_emulated; built if their sources have changed."""
    return routes.emulated_library()


@pytest.fixture
def emulated(request):
    """dnl_ext with every operator on CPU tensors computed by the emulated CUDA route."""
    if LEFT_OUT:
        pytest.skip(toolchain.WITHOUT_KERNELS)
    with routes.route("emulated", zlib.crc32(request.node.nodeid.encode())):
        yield
