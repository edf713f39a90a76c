// What is found out once for a device and never changes, such as its attributes, each of which costs a driver call.
#pragma once

#include <map>
#include <mutex>

namespace dnl {

template <class Value>
class PerDevice {
 public:
  // find() the first time that `device` is asked for, later what it returned. If it throws, the next call tries again.
  template <class Find>
  Value get(int device, const Find& find) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = values_.find(device);
    return known != values_.end() ? known->second : values_.emplace(device, find()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<int, Value> values_;
};

}  // namespace dnl
