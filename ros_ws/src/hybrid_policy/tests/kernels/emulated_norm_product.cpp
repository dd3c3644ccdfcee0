// norm_product.cu on a CPU against double: argv is rows, K and a seed. See test_norm_product.py, which writes kernel.inc.
#include "emulated_cluster.h"
// clang-format off
#include "kernel.inc"

Arguments arguments;

void entry() {
    norm_product(arguments);
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// random values as the kernel holds them, and what they are
std::vector<u8> operands(size_t count, std::vector<double>& values) {
    std::normal_distribution<float> normal(0, 2);
    std::vector<u8> bytes(count);
    for (u8& byte : bytes) byte = to_e4m3(normal(chance)), values.push_back(from_e4m3(byte));
    return bytes;
}

int main(int, char** argv) {
    const int rows = atoi(argv[1]), k = atoi(argv[2]), n = 8 * NT, behind = 64;  // rows behind, which must stay
    chance.seed(atoi(argv[3]));
    std::normal_distribution<float> normal;
    std::vector<double> a, w;
    const std::vector<u8> a_bytes = operands((size_t)rows * k, a), w_bytes = operands((size_t)n * k, w);
    std::vector<float4> x_memory((rows + behind) * n / 4), vectors(3 * n / 4), out_memory((rows + behind) * n / 16);
    float *x = &x_memory[0].x, *v = &vectors[0].x;
    u8* out = (u8*)out_memory.data();
    for (int i = 0; i < 3 * n; i++) v[i] = normal(chance);
    for (int i = 0; i < (rows + behind) * n; i++) x[i] = 50 + 3 * normal(chance);
    const std::vector<float4> x_before = x_memory, out_before = out_memory;

    const Map a_map{a_bytes.data(), rows, k, ROWS}, w_map{w_bytes.data(), n, k, NT};
    memcpy(arguments.a, &a_map, sizeof a_map);
    memcpy(arguments.w, &w_map, sizeof w_map);
    arguments.x = x, arguments.bias = v, arguments.weight = v + n, arguments.shift = v + 2 * n, arguments.out = out;
    arguments.rows = rows, arguments.chunks = (k + 127) / 128, arguments.scale = 0.01f, arguments.eps = 1e-6f;
    run_clusters((rows + ROWS - 1) / ROWS, entry);

    const float* before = &x_before[0].x;
    double worst_x = 0, worst_h = 0;
    for (int r = 0; r < rows; r++) {
        std::vector<double> total(n);
        double sum = 0, squares = 0;
        for (int c = 0; c < n; c++) {
            double product = 0;
            for (int i = 0; i < k; i++) product += a[(size_t)r * k + i] * w[(size_t)c * k + i];
            total[c] = before[r * n + c] + product * 0.01f + v[c];
            sum += total[c];
        }
        for (double t : total) squares += (t - sum / n) * (t - sum / n);
        for (int c = 0; c < n; c++) {
            const double h = (total[c] - sum / n) / std::sqrt(squares / n + 1e-6) * v[n + c] + v[2 * n + c];
                        worst_x = std::max(worst_x, std::fabs(x[r * n + c] - total[c]) / 50);
            worst_h = std::max(worst_h, std::fabs(from_e4m3(out[r * n + c]) - h) / (std::fabs(h) + 0.02));
        }
    }
    if (memcmp(x + rows * n, before + rows * n, behind * n * 4)) return printf("x was written behind its rows\n"), 1;
    if (memcmp(out + rows * n, (u8*)out_before.data() + rows * n, behind * n))
        return printf("h was written behind its rows\n"), 1;
    printf("%g %g\n", worst_x, worst_h);
    return worst_x > 1e-6 || worst_h > 0.07;
}
