// What is found out or set once for a device and then known, such as its attributes, each of which costs a driver call.
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

// Limits that are raised and never lowered, one for each key.
template <class Key>
class Limits {
 public:
  // raise() where `value` is above all that `key` was raised to. If it throws, nothing has been raised.
  template <class Raise>
  void at_least(const Key& key, int64_t value, const Raise& raise) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = values_.find(key);
    if (known != values_.end() && known->second >= value) return;
    raise();
    values_[key] = value;
  }

 private:
  std::mutex mutex_;
  std::map<Key, int64_t> values_;
};

}  // namespace dnl
