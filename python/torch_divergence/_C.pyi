__version__: str
torch_version: str
cuda: bool
cuda_architectures: tuple[str, ...]

def cpu_capability() -> str: ...
def empty_cache() -> None: ...
