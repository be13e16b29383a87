// test_corpus.c: what the fuzzer of the core found worth keeping, on every instruction set of this machine.
#include "../long/fuzz_core.c"
#include <dirent.h>

int main(void) {
    int n_files = 0, n_isas = 0;
    while (tl_isa_names()[n_isas]) n_isas++;
    DIR *folder = opendir(TINYLLM_CORPUS);
    must(folder != NULL, "the folder " TINYLLM_CORPUS);
    for (const struct dirent *entry; (entry = readdir(folder));) {
        char path[4096];
        snprintf(path, sizeof path, TINYLLM_CORPUS "/%s", entry->d_name);
        FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "rb");
        if (!file) continue;
        uint8_t data[8192];
        const size_t n = fread(data, 1, sizeof data, file);
        fclose(file);
        for (int i = 0; i < n_isas && n > 1; i++) {
            data[0] = (uint8_t)i; // its first number is the instruction set
            data[1] = 0;
            uint8_t *exact = exactly(n); // so that AddressSanitizer sees one byte too far
            memcpy(exact, data, n);
            LLVMFuzzerTestOneInput(exact, n);
            free(exact);
        }
        n_files++;
    }
    closedir(folder);
    must(n_files > 30, "a corpus");
    must(n_computed >= 4 * n_isas, "calls that compute");
    printf("corpus: %d inputs on %d instruction sets, %d calls computed\n", n_files, n_isas, n_computed);
    return 0;
}
