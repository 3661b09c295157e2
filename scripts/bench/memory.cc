// Reads memory from several threads: `memory MEGABYTES THREADS ROUNDS` prints the median and the best GB/s.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const size_t bytes = std::strtoull(argv[1], nullptr, 10) << 20;
  const int threads = std::atoi(argv[2]), rounds = std::atoi(argv[3]);
  typedef int64_t Vector __attribute__((vector_size(64)));
  const size_t count = bytes / sizeof(Vector);
  Vector* data = static_cast<Vector*>(std::aligned_alloc(64, bytes));
  for (size_t i = 0; i < count; ++i) data[i] = Vector{} + static_cast<int64_t>(i);
  std::atomic<int> round{0}, done{0};
  std::atomic<int64_t> sink{0};
  const auto read = [&](int thread) {
    const size_t begin = count * thread / threads / 4 * 4, end = count * (thread + 1) / threads / 4 * 4;
    Vector sums[4] = {};
    for (size_t i = begin; i < end; i += 4) {
      for (int j = 0; j < 4; ++j) sums[j] ^= data[i + j];
    }
    sink += (sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back([&, thread] {
      for (int next = 1; next <= rounds; ++next) {
        while (round.load() < next) {
        }
        read(thread);
        ++done;
      }
    });
  }
  std::vector<double> rates;
  for (int next = 1; next <= rounds; ++next) {
    done = 0;
    const auto start = std::chrono::steady_clock::now();
    round = next;
    read(0);
    while (done.load() < threads - 1) {
    }
    rates.push_back(bytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1e9);
  }
  for (auto& other : others) other.join();
  std::sort(rates.begin(), rates.end());
  std::printf("%.2f %.2f\n", rates[rates.size() / 2], rates.back());
}
