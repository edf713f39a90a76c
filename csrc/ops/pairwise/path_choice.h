// What decides the path of a call of pairwise attention on CUDA, beside its shape: the environment, and whoever has
// measured on this GPU. The latter is not known here: the Python module registers a function that is asked
// (dnl_ext/tuning). Without it, and so in a program without Python, a call takes the chain.
#pragma once

#include <string>

#include "ops/pairwise/pairwise_plan.h"

namespace dnl {

// A call whose path is to be chosen. Of float32: one that may use TF32, since no other has a choice.
struct PathQuestion {
  int device = 0;
  bool backward = false;
  Gpu gpu;
  PairwiseShape shape;
};

struct PathAnswer {
  CudaPath path = CudaPath::chain;
  bool keep = true;  // whether later calls of the same shape take it unasked
};

using PathQuery = PathAnswer (*)(const PathQuestion& question);  // called from any thread

DNL_EXPORT void set_path_query(PathQuery query);
// The answer for a call, asked for once; the chain where nobody is registered.
DNL_EXPORT CudaPath advised_path(const PathQuestion& question);
// Lets every shape be asked for anew.
DNL_EXPORT void forget_paths();

// What this thread's calls take whatever else is set, by_default for none: how paths are checked and timed one by one.
DNL_EXPORT void force_path(CudaPath path);
// What a call must take: the thread's path, or else that of DNL_EXT_CUDA_PATH.
DNL_EXPORT CudaPath requested_path();

// The plan of a call. `tf32` is asked for only where the answer matters.
inline PairwisePlan choose_path(PathQuestion question, bool (*tf32)()) {
  const CudaPath request = requested_path();
  CudaPath advised = CudaPath::by_default;
  if (request == CudaPath::by_default && has_choice(question.shape, question.gpu, question.backward))
    advised = advised_path(question);
  const CudaPath wanted = request == CudaPath::by_default ? advised : request;
  question.shape.tf32 = tf32_matters(question.shape, question.gpu, wanted, question.backward) && tf32();
  return plan_pairwise(question.shape, question.gpu, request, question.backward, advised);
}

}  // namespace dnl
