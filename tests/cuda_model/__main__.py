"""What the shipped kernels cost, without a GPU (docs/gpu-model.md).

    PYTHONPATH=tests python -m cuda_model                   tables of shipped kernels, of whole calls beside eager
    PYTHONPATH=tests python -m cuda_model --check           against tests/cuda_model_budget.json; worse fails
    PYTHONPATH=tests python -m cuda_model --write           rewrites the budget
    PYTHONPATH=tests python -m cuda_model --calibrate DIR   models published kernels, from checkouts in DIR
    PYTHONPATH=tests python -m cuda_model FILE.cubin ...    loops of any kernel (loops.py)

Exits 1 where a kernel is worse than the budget, 3 where a tool is missing.
"""

import pathlib
import sys

if __name__ == "__main__":
    if len(sys.argv) > 1 and pathlib.Path(sys.argv[1]).is_file():
        from . import loops

        sys.exit(loops.main())
    from . import report

    sys.exit(report.main())
