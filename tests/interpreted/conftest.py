"""The files beside this one run the Triton kernels under Triton's interpreter, on CPU tensors.

TRITON_INTERPRET is read when a kernel is decorated, so they need a process that has it from the start:
``TRITON_INTERPRET=1 pytest tests/interpreted``. Without it nothing is collected here; tests/test_interpreted.py starts
such a process for each file.
"""

from support import interpreter

collect_ignore_glob = [] if interpreter.ON else ["test_*.py"]
