# one.sh FILE: compile one .cu quickly for sm_90
I=/work/venv-cu/lib/python3.11/site-packages/torch/include
nice /usr/local/cuda-13.0/bin/nvcc -std=c++17 -Icsrc -I$I -I$I/torch/csrc/api/include -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA -DDNL_EXT_WITH_CUDA -gencode arch=compute_90,code=sm_90 -O3 -lineinfo -Xptxas=-v --expt-relaxed-constexpr -Xcompiler -Wall,-fPIC -c "$1" -o /tmp/one_$(basename $1).o
