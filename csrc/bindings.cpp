// bindings.cpp: the core as a Python module: numpy arrays in and out, the GIL released while C runs, C's
// errors raised as tinyllm's. No logic. Includes tinyllm.h only; backends/ imports it, and two files what loops
// over a vocabulary's strings: files/gguf.py and tokenizer/spm.py.
#include "tinyllm.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <pthread.h>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <variant>
#include <vector>

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Bits = py::array_t<uint32_t, py::array::c_style>;

namespace {

// A thread of Python's that waits for the GIL while the interpreter ends is torn down where it stands, and amid C++ that
// terminates the process. So at exit calls are stopped and waited for, and in all threads but the one that exits they end
// with SystemExit, as new ones do: it ends a thread without a word, and lets go of the locks that it holds, which what
// else runs at exit may want.
struct Door {
    std::atomic<int> calls{0};
    std::atomic<bool> shut{false}, sealed{false};
    std::thread::id keeper;

    bool keeps_out() const { return shut && std::this_thread::get_id() != keeper; }
    [[noreturn]] static void send_away() {
        PyErr_SetNone(PyExc_SystemExit);
        throw py::error_already_set();
    }
    void close() { // at exit, with the GIL: returns when there is no call, or after 2 s
        keeper = std::this_thread::get_id();
        shut = true;
        py::gil_scoped_release released;
        for (int ms = 0; calls > 0 && ms < 2000; ms++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        sealed = true; // who comes back later than that sleeps until the process is gone
    }
} door;

struct Call { // of a function that lets go of the GIL, or may run Python's code
    Call() {
        if (door.keeps_out()) Door::send_away();
        door.calls++; // with the GIL, as door.shut is set
    }
    Call(const Call &) = delete;
    ~Call() { door.calls--; }
};

class Released { // the GIL, while C runs
    PyThreadState *state = PyEval_SaveThread();

  public:
    explicit Released(const Call &) {}
    Released(const Released &) = delete;
    ~Released() {
        while (door.sealed && door.keeps_out()) pause();
        PyEval_RestoreThread(state);
    }
};

[[noreturn]] void raise(const char *error, const char *text) {
    PyErr_SetString(py::module_::import("tinyllm.errors").attr(error).ptr(), text);
    throw py::error_already_set();
}

[[noreturn]] void raise(tl_status status, const tl_message &message) {
    if (status == TL_CANCELLED && door.keeps_out()) Door::send_away();
    raise(status == TL_CANCELLED     ? "CancelledError"
          : status == TL_MEMORY      ? "MemoryLimitError"
          : status == TL_IO          ? "FormatError"
          : status == TL_UNSUPPORTED ? "UnsupportedError"
                                     : "ArgumentError",
          message.text);
}

[[noreturn]] void raise_argument(const std::string &text) { raise("ArgumentError", text.c_str()); }

template <class Array> Array array_of(std::vector<py::ssize_t> shape) { // or MemoryLimitError
    try {
        return Array(shape);
    } catch (py::error_already_set &error) {
        if (!error.matches(PyExc_MemoryError)) throw;
    }
    raise("MemoryLimitError", "no memory for the result; ask for less at once");
}

const tl_format *format_of(int id) {
    const tl_format *format = tl_format_of(id);
    if (!format) raise_argument("no format has the id " + std::to_string(id));
    return format;
}

// What the core asks before each layer, passed on to Python at most every 20 ms: the caller's should_stop
// and, on the main thread, Python's signals. An exception ends the call and is raised again after it. While the
// interpreter ends nobody is asked.
struct Watch {
    py::object should_stop;
    bool main_thread, raised = false;
    std::chrono::steady_clock::time_point last{};

    static int ask(void *data) {
        if (door.keeps_out()) return 1;
        auto *self = static_cast<Watch *>(data);
        auto now = std::chrono::steady_clock::now();
        if ((self->should_stop.is_none() && !self->main_thread) || now - self->last < std::chrono::milliseconds(20))
            return 0;
        self->last = now;
        PyGILState_STATE gil = PyGILState_Ensure();
        int stop = self->main_thread && PyErr_CheckSignals() != 0 ? -1 : 0;
        if (!stop && !self->should_stop.is_none()) {
            PyObject *answer = PyObject_CallNoArgs(self->should_stop.ptr());
            stop = answer ? PyObject_IsTrue(answer) : -1;
            Py_XDECREF(answer);
        }
        PyGILState_Release(gil);
        self->raised = stop < 0;
        return stop != 0;
    }
};

bool on_main_thread() {
    py::object threading = py::module_::import("threading");
    return threading.attr("get_ident")().equal(threading.attr("main_thread")().attr("ident"));
}

struct Cache {
    std::shared_ptr<tl_cache> p;
    std::shared_ptr<tl_states> states; // beside the pages, or null

    tl_cache *get() const {
        if (!p) raise("ModelClosedError", "the cache is closed");
        return p.get();
    }
    template <class F, class... A> void run(F f, A... arguments) {
        Call call;
        std::shared_ptr<tl_cache> keep = (get(), p);
        tl_message message{"the device failed while pages were written"}; // backends have no words for that
        tl_status status;
        {
            Released released(call);
            status = f(keep.get(), arguments..., &message);
        }
        if (status != TL_OK) raise(status, message);
    }
    template <class F, class... A> void run_states(F f, A... arguments) {
        if (get(); !states) raise_argument("this model keeps no states");
        Call call;
        std::shared_ptr<tl_states> keep = states;
        tl_message message{"the device failed while states were written"};
        tl_status status;
        {
            Released released(call);
            status = f(keep.get(), arguments..., &message);
        }
        if (status != TL_OK) raise(status, message);
    }
};

// An adapter of a model, which it keeps. A sequence's: each with its strength.
struct Adapter {
    std::shared_ptr<tl_adapter> p;

    Adapter(std::shared_ptr<tl_model> model, int room) {
        tl_adapter *adapter = nullptr;
        tl_message message;
        tl_status status = tl_adapter_create(&adapter, model.get(), room, &message);
        if (status != TL_OK) raise(status, message);
        p.reset(adapter, [model](tl_adapter *a) { tl_adapter_free(a); });
    }

    // a and b: their rows as their formats have them.
    void add(const std::string &name, int layer, int rank, bool has_bias, float scale, int a_format, const Bytes &a,
             int b_format, const Bytes &b) {
        Call call;
        const tl_matrix *of = tl_model_matrix(p->model, name.c_str(), layer);
        if (!of) raise_argument("there is no matrix \"" + name + "\" in layer " + std::to_string(layer));
        const bool looked_up = of == &p->model->embedding;
        const tl_source from_a{format_of(a_format), -1, 0, a.data(), nullptr, 0, 0, nullptr, 0};
        const tl_source from_b{format_of(b_format), -1, 0, b.data(), nullptr, 0, 0, nullptr, 0};
        const int64_t n_a = static_cast<int64_t>(looked_up ? of->rows : of->k) * rank;
        const int64_t n_b = static_cast<int64_t>(looked_up ? of->k : of->rows) * (rank + has_bias);
        if (rank < 1 || a.size() != n_a * from_a.format->block_bytes || b.size() != n_b * from_b.format->block_bytes)
            raise_argument(name + " of rank " + std::to_string(rank) + " has matrices of another size");
        tl_message message;
        tl_status status;
        {
            Released released(call);
            status = tl_adapter_add(p.get(), name.c_str(), layer, rank, has_bias, scale, &from_a, &from_b, &message);
        }
        if (status != TL_OK) raise(status, message);
    }
};
using Uses = std::vector<std::vector<std::pair<const Adapter *, float>>>;

struct Model {
    std::shared_ptr<tl_model> p;
    std::vector<py::array_t<double>> observed;

    Model(const py::dict &c, uintptr_t backend) { // backend: the address of its tl_backend, 0: the CPU's
        Floats factors, xielu;
        Ints windows, ropes, places, mixers;
        tl_config config{};
        auto integer = [&](const char *name) { return c[name].cast<int>(); };
        auto number = [&](const char *name) { return c[name].cast<float>(); };
        auto per_layer = [&](const char *name, Ints &array) {
            array = c[name].cast<Ints>();
            if (array.size() != config.n_layers) raise_argument(std::string(name) + " must have a number a layer");
            return array.data();
        };
        config.n_layers = integer("n_layers");
        config.dim = integer("dim");
        config.n_heads = integer("n_heads");
        config.n_kv_heads = integer("n_kv_heads");
        config.head_dim = integer("head_dim");
        config.ff_dim = integer("ff_dim");
        config.vocab_size = integer("vocab_size");
        config.context = integer("context");
        config.n_experts = integer("n_experts");
        config.n_experts_used = integer("n_experts_used");
        config.norm_topk_prob = c["norm_topk_prob"].cast<bool>();
        config.rope_dim = integer("rope_dim");
        config.norm_eps = number("norm_eps");
        config.attention_scale = number("attention_scale");
        config.rope_theta = c["rope_theta"].cast<double>();
        config.rope_scale = number("rope_scale");
        config.norm_kind = static_cast<tl_norm_kind>(integer("norm_kind"));
        config.norm_place = static_cast<tl_norm_place>(integer("norm_place"));
        config.activation = static_cast<tl_activation>(integer("activation"));
        config.qk_norm = static_cast<tl_qk_norm>(integer("qk_norm"));
        config.qk_norm_late = integer("qk_norm_late");
        config.qkv_limit = number("qkv_limit");
        config.parallel = integer("parallel");
        config.bidirectional = integer("bidirectional");
        config.attention_cap = number("attention_cap");
        config.logit_cap = number("logit_cap");
        config.embedding_scale = number("embedding_scale");
        config.residual_scale = number("residual_scale");
        config.logit_scale = number("logit_scale");
        config.local_rope_theta = c["local_rope_theta"].cast<double>();
        config.query_growth = c["query_growth"].cast<double>();
        config.query_span = integer("query_span");
        config.windows = per_layer("windows", windows);
        config.ropes = per_layer("ropes", ropes);
        config.page_layers = integer("page_layers");
        config.places = per_layer("places", places);
        config.mixers = per_layer("mixers", mixers);
        config.gated_attention = integer("gated_attention");
        config.delta = {integer("delta_k_heads"), integer("delta_v_heads"), integer("delta_k_dim"),
                        integer("delta_v_dim"),   integer("delta_kernel"),  integer("delta_tiled")};
        if (!c["rope_factors"].is_none()) {
            factors = c["rope_factors"].cast<Floats>();
            if (factors.size() != config.rope_dim / 2) raise_argument("rope_factors must have rope_dim / 2 numbers");
            config.rope_factors = factors.data();
        }
        if (!c["xielu"].is_none()) {
            xielu = c["xielu"].cast<Floats>();
            if (xielu.size() != static_cast<py::ssize_t>(config.n_layers) * TL_XIELU_NUMBERS)
                raise_argument("xielu must have " + std::to_string(TL_XIELU_NUMBERS) + " numbers a layer");
            config.xielu = xielu.data();
        }
        tl_model *model = nullptr;
        tl_message message;
        const auto *table = backend ? reinterpret_cast<const tl_backend *>(backend) : &tl_backend_cpu;
        tl_status status = tl_model_create(&model, &config, table, &message);
        if (status != TL_OK) raise(status, message);
        p.reset(model, tl_model_free);
    }

    tl_model *get() const {
        if (!p) raise("ModelClosedError", "the model is closed");
        return p.get();
    }

    void check() {
        tl_message message;
        tl_status status = tl_model_check(get(), &message);
        if (status != TL_OK) raise(status, message);
    }

    py::object forward(Cache &cache, const py::object &tokens, const py::object &x, const Ints &positions,
                       const Ints &sequences, const Ints &page_tables, const Ints &rows, int first_layer,
                       int last_layer, bool logits, int n_candidates, const std::optional<Bits> &allowed,
                       const std::optional<Uses> &adapters, const std::optional<Ints> &states_in,
                       const std::optional<Ints> &saves, int threads, const py::object &should_stop) {
        Call call;
        std::shared_ptr<tl_model> model = (get(), p);
        std::shared_ptr<tl_cache> pages = (cache.get(), cache.p);
        std::shared_ptr<tl_states> states = cache.states;
        const tl_config &config = model->config;
        tl_batch batch{};
        Ints token_array;
        Floats x_array;
        batch.n = static_cast<int>(positions.size());
        if (!tokens.is_none()) batch.tokens = (token_array = tokens.cast<Ints>()).data();
        if (!x.is_none()) batch.x = (x_array = x.cast<Floats>()).data();
        if ((batch.tokens && token_array.size() != batch.n) || sequences.size() != batch.n ||
            (batch.x && x_array.size() != static_cast<py::ssize_t>(batch.n) * config.dim))
            raise_argument("tokens (or x [n, dim]), positions and sequences must be of one length");
        const auto dims = page_tables.ndim();
        if ((dims != 2 && dims != 3) || (dims == 3 ? page_tables.shape(1) : 1) != model->n_tables)
            raise_argument("page_tables must be [n_sequences, " + std::to_string(model->n_tables) +
                           ", max_pages], or [n_sequences, max_pages] where a sequence has one table");
        batch.positions = positions.data();
        batch.sequences = sequences.data();
        batch.n_sequences = static_cast<int>(page_tables.shape(0));
        batch.max_pages = static_cast<int>(page_tables.shape(dims - 1));
        batch.page_tables = page_tables.data();
        batch.first_layer = first_layer;
        batch.last_layer = last_layer;
        batch.n_rows = static_cast<int>(rows.size());
        batch.rows = rows.data();
        batch.threads = threads;
        Floats out;
        std::vector<tl_candidate> candidates;
        std::vector<tl_total> totals;
        if (n_candidates == 0) {
            out = array_of<Floats>({logits ? batch.n_rows : batch.n, logits ? config.vocab_size : config.dim});
            (logits ? batch.logits : batch.activations) = out.mutable_data();
        } else {
            const int most = std::clamp(n_candidates, 0, model->backend->most_candidates);
            candidates.resize(static_cast<size_t>(batch.n_rows) * static_cast<size_t>(most));
            totals.resize(static_cast<size_t>(batch.n_rows));
            batch.n_candidates = n_candidates;
            batch.candidates = candidates.data();
            batch.totals = totals.data();
        }
        if (allowed) {
            const py::ssize_t words = (config.vocab_size + 31) / 32;
            if (allowed->ndim() != 2 || allowed->shape(0) != batch.n_rows || allowed->shape(1) != words)
                raise_argument("allowed must be [" + std::to_string(batch.n_rows) + ", " + std::to_string(words) + "]");
            batch.allowed = allowed->data();
        }
        std::vector<tl_use> uses;
        std::vector<int32_t> use_ends;
        std::vector<std::shared_ptr<tl_adapter>> kept; // should_stop may drop them
        if (adapters) {
            if (adapters->size() != static_cast<size_t>(batch.n_sequences))
                raise_argument("adapters must be a list for each of " + std::to_string(batch.n_sequences) +
                               " sequences");
            for (const auto &of_sequence : *adapters) {
                for (const auto &[adapter, scale] : of_sequence) {
                    if (!adapter) raise_argument("an adapter is None");
                    kept.push_back(adapter->p);
                    uses.push_back({adapter->p.get(), scale});
                }
                use_ends.push_back(static_cast<int32_t>(uses.size()));
            }
            batch.uses = uses.data();
            batch.use_ends = use_ends.data();
        }
        static_assert(sizeof(tl_save) == 2 * sizeof(int32_t));
        batch.states = states.get();
        if (states_in) {
            if (states_in->size() != batch.n_sequences) raise_argument("states_in must be a slot for each sequence");
            batch.states_in = states_in->data();
        }
        if (saves) {
            if (saves->ndim() != 2 || saves->shape(1) != 2) raise_argument("saves must be [n, 2]: tokens and slots");
            batch.n_saves = static_cast<int>(saves->shape(0));
            batch.saves = reinterpret_cast<const tl_save *>(saves->data());
        }
        Watch watch{should_stop, on_main_thread()};
        batch.stop = Watch::ask;
        batch.stop_data = &watch;
        tl_message message;
        tl_status status;
        {
            Released released(call);
            status = tl_forward(model.get(), pages.get(), &batch, &message);
        }
        if (watch.raised) throw py::error_already_set();
        if (status != TL_OK) raise(status, message);
        if (n_candidates == 0) return std::move(out);
        Ints ids({batch.n_rows, n_candidates});
        Floats their_logits({batch.n_rows, n_candidates}), largest(batch.n_rows);
        py::array_t<double> sums(batch.n_rows);
        for (size_t i = 0; i < candidates.size(); i++) {
            ids.mutable_data()[i] = candidates[i].token;
            their_logits.mutable_data()[i] = candidates[i].logit;
        }
        for (size_t i = 0; i < totals.size(); i++) {
            sums.mutable_data()[i] = totals[i].sum;
            largest.mutable_data()[i] = totals[i].largest;
        }
        return py::make_tuple(ids, their_logits, sums, largest);
    }

    Floats unpack(const std::string &name, int layer) {
        const tl_matrix *matrix = tl_model_matrix(get(), name.c_str(), layer);
        if (!matrix) raise_argument("there is no matrix \"" + name + "\" in layer " + std::to_string(layer));
        auto out = array_of<Floats>({matrix->rows, matrix->k});
        tl_message message{"the device failed while a matrix was read"};
        tl_status status = tl_model_unpack(get(), name.c_str(), layer, out.mutable_data(), &message);
        if (status != TL_OK) raise(status, message);
        return out;
    }

    // Its numbers grow with every call; they are freed with the model.
    py::array_t<double> observe(const std::string &name, int layer) {
        const tl_matrix *matrix = tl_model_matrix(get(), name.c_str(), layer);
        if (!matrix) raise_argument("there is no matrix \"" + name + "\" in layer " + std::to_string(layer));
        py::array_t<double> seen(matrix->k + 1);
        std::fill_n(seen.mutable_data(), seen.size(), 0.0);
        observed.push_back(seen);
        tl_message message;
        tl_model_observe(get(), name.c_str(), layer, seen.mutable_data(), &message);
        return seen;
    }

    Cache cache(int type, int max_pages, int max_slots) {
        tl_cache *cache = nullptr;
        tl_states *states = nullptr;
        tl_message message;
        tl_status status = tl_cache_create(&cache, get(), type, max_pages, &message);
        if (status != TL_OK) raise(status, message);
        Cache made{std::shared_ptr<tl_cache>(cache, tl_cache_free), nullptr};
        if (!max_slots) return made;
        status = tl_states_create(&states, get(), max_slots, &message);
        if (status != TL_OK) raise(status, message);
        made.states = std::shared_ptr<tl_states>(states, tl_states_free);
        return made;
    }
};

// A weight on its way: its name, layer, where it lies, its format there and as it is kept, the order of its rows (or None),
// row_stride, where its scales lie apart (or None), and the factor of its numbers. It lies at an offset of an open file, or in an array of floats.
using Place = std::pair<int, uint64_t>;
using Weight = std::tuple<std::string, int, std::variant<Place, Floats>, int, int, std::optional<Ints>, int,
                          std::optional<Place>, float>;

// Weights that are packed one after another by a thread of its own, which knows nothing of Python, while Python does
// something else. It ends within a weight's time when it is told to stop, which a destructor does, too.
class Uploads {
  public:
    Uploads(const Model &model, std::vector<Weight> given, py::object files, int threads)
        : model((model.get(), model.p)), weights(std::move(given)), files(std::move(files)), threads(threads),
          sources(2 * weights.size()) {
        for (size_t i = 0; i < weights.size(); i++) describe(weights[i], sources[2 * i], sources[2 * i + 1]);
        if (door.keeps_out()) Door::send_away();
        begun_late = door.shut;
        door.calls++; // until run() ends
        sigset_t all, before;
        sigfillset(&all); // signals are for the program's own threads
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int error = 0;
        try {
            thread = std::make_unique<std::thread>([this] { run(); });
        } catch (const std::system_error &) {
            error = 1;
            door.calls--;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (error) raise("MemoryLimitError", "no memory for a thread that packs weights");
    }
    Uploads(const Uploads &) = delete;
    ~Uploads() { join(); }

    // How many are packed, once it is more than n, or 20 ms later.
    size_t wait(size_t n) {
        Call call;
        if (pid != getpid()) raise("CancelledError", "the process was forked while a model was loaded: load it again");
        size_t now = 0;
        bool failed = false;
        {
            Released released(call);
            std::unique_lock<std::mutex> locked(lock);
            news.wait_for(locked, std::chrono::milliseconds(20), [&] { return n_packed > n || status != TL_OK; });
            now = n_packed;
            failed = status != TL_OK;
        }
        if (failed && now <= n) raise(status, message);
        return now;
    }

    void stop() {
        if (door.keeps_out()) return join();
        Call call;
        Released released(call);
        join();
    }

  private:
    static void describe(const Weight &weight, tl_source &source, tl_source &scales) {
        const auto &[name, layer, place, from, to, order, row_stride, scales_at, factor] = weight;
        source = {format_of(from), -1, 0, nullptr, nullptr, 0, row_stride, nullptr, factor};
        format_of(to);
        if (const auto *at = std::get_if<Place>(&place))
            std::tie(source.fd, source.offset) = *at;
        else
            source.memory = reinterpret_cast<const uint8_t *>(std::get<Floats>(place).data());
        if (order) {
            source.row_order = order->data();
            source.n_row_order = static_cast<int>(order->size());
        }
        scales = source;
        if (scales_at) {
            std::tie(scales.fd, scales.offset) = *scales_at;
            source.scales = &scales;
        }
    }

    void run() {
        for (size_t i = 0; i < weights.size(); i++) {
            tl_message problem{"loading was stopped"};
            tl_status found = TL_CANCELLED;
            if (!stopped && (!door.shut || begun_late))
                found = tl_model_upload(model.get(), std::get<0>(weights[i]).c_str(), std::get<1>(weights[i]),
                                        &sources[2 * i], tl_format_of(std::get<4>(weights[i])), threads, &problem);
            std::unique_lock<std::mutex> locked(lock);
            if (found == TL_OK) {
                n_packed++;
            } else {
                status = found;
                message = problem;
            }
            news.notify_all();
            if (found != TL_OK) break;
        }
        door.calls--;
    }

    void join() {
        stopped = true;
        if (pid == getpid()) {
            if (thread && thread->joinable()) thread->join();
        } else {
            (void)thread.release(); // the child of a fork does not have it
        }
        model.reset();
    }

    std::shared_ptr<tl_model> model;
    const std::vector<Weight> weights;
    const py::object files; // open until the thread has ended
    const int threads;
    std::vector<tl_source> sources; // of each weight its own, and that of its scales
    const pid_t pid = getpid();
    bool begun_late = false; // by what runs at exit
    std::atomic<bool> stopped{false};
    std::mutex lock; // of the four below
    std::condition_variable news;
    size_t n_packed = 0;
    tl_status status = TL_OK;
    tl_message message{};
    std::unique_ptr<std::thread> thread;
};

py::list formats() {
    py::list all;
    for (const tl_format *f = tl_formats; f->name; f++)
        all.append(py::make_tuple(f->id, f->name, f->block, f->block_bytes, f->panel_bytes));
    return all;
}

Floats pack_unpack(const py::bytes &data, int format, int rows, int k) {
    std::string bytes = data;
    const tl_format *f = format_of(format);
    if (rows < 1 || k < 1 || k % f->block ||
        bytes.size() !=
            static_cast<size_t>(rows) * static_cast<size_t>(k / f->block) * static_cast<size_t>(f->block_bytes))
        raise_argument("data is not rows x k numbers of this format");
    tl_matrix matrix{f, rows, k, nullptr, 0, nullptr, 0, nullptr};
    tl_source source{f, -1, 0, reinterpret_cast<const uint8_t *>(bytes.data()), nullptr, 0, 1, nullptr, 0};
    auto out = array_of<Floats>({rows, k});
    tl_message message;
    tl_pool_enter();
    tl_status status = tl_backend_cpu.upload(&matrix, &source, 1, &message);
    tl_pool_leave();
    if (status != TL_OK) raise(status, message);
    tl_backend_cpu.unpack(&matrix, out.mutable_data());
    tl_backend_cpu.free(matrix.data);
    return out;
}

// rows of a tensor in one format -> uint8 [rows, bytes of a row] in another.
Bytes convert(const Bytes &data, int source_format, int format, size_t rows, size_t k, const py::object &importance,
              int threads) {
    Call call;
    const tl_format *from = format_of(source_format), *to = format_of(format);
    auto bytes_of = [k](const tl_format *f) {
        return k / static_cast<size_t>(f->block) * static_cast<size_t>(f->block_bytes);
    };
    if (static_cast<size_t>(data.size()) != rows * bytes_of(from)) raise_argument("data is not rows x k numbers");
    Floats weights;
    if (!importance.is_none()) weights = importance.cast<Floats>();
    if (!importance.is_none() && static_cast<size_t>(weights.size()) != k) raise_argument("importance must be [k]");
    auto out = array_of<Bytes>({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(bytes_of(to))});
    uint8_t *blocks = out.mutable_data();
    const float *of_columns = importance.is_none() ? nullptr : weights.data();
    tl_message message;
    tl_status status;
    {
        Released released(call);
        status = tl_convert(blocks, to, data.data(), from, rows, k, of_columns, threads, &message);
    }
    if (status != TL_OK) raise(status, message);
    return out;
}

using Sequences = std::vector<std::vector<int32_t>>;

// Sequences one after another, as C takes them.
struct Flat {
    std::vector<int32_t> ids, ends;

    explicit Flat(const Sequences &sequences) {
        for (const std::vector<int32_t> &sequence : sequences) {
            ids.insert(ids.end(), sequence.begin(), sequence.end());
            ends.push_back(static_cast<int32_t>(ids.size()));
        }
    }
    tl_sequences view() const { return {static_cast<int>(ends.size()), ids.data(), ends.data()}; }
};

using Total = std::pair<double, float>; // a tl_total

tl_total total_of(const std::optional<Total> &total) {
    return total ? tl_total{total->first, total->second} : tl_total{};
}

// What a text asks of sampling: made once, used for each of its tokens, by any thread.
class Sampling {
  public:
    Sampling(float temperature, int top_k, float top_p, float min_p, float typical_p, float repetition_penalty,
             float presence_penalty, float frequency_penalty, int penalty_window, float xtc_probability,
             float xtc_threshold, std::vector<int32_t> bias_tokens, std::vector<float> bias, int no_repeat_ngram_size,
             const Sequences &bad_words, float dry_multiplier, float dry_base, int dry_allowed_length,
             int dry_penalty_last_n, Sequences breakers, uint64_t seed)
        : bias_tokens(std::move(bias_tokens)), bias(std::move(bias)), bad_words(bad_words),
          breakers(sorted(std::move(breakers))), seed(seed) {
        if (this->bias_tokens.size() != this->bias.size()) raise_argument("bias_tokens and bias must be of one length");
        settings.temperature = temperature;
        settings.top_k = top_k;
        settings.top_p = top_p;
        settings.min_p = min_p;
        settings.typical_p = typical_p;
        settings.repetition_penalty = repetition_penalty;
        settings.presence_penalty = presence_penalty;
        settings.frequency_penalty = frequency_penalty;
        settings.penalty_window = penalty_window;
        settings.xtc_probability = xtc_probability;
        settings.xtc_threshold = xtc_threshold;
        settings.n_bias = static_cast<int>(this->bias.size());
        settings.bias_tokens = this->bias_tokens.data();
        settings.bias = this->bias.data();
        settings.no_repeat_ngram_size = no_repeat_ngram_size;
        settings.bad_words = this->bad_words.view();
        settings.dry_multiplier = dry_multiplier;
        settings.dry_base = dry_base;
        settings.dry_allowed_length = dry_allowed_length;
        settings.dry_penalty_last_n = dry_penalty_last_n;
        settings.breakers = this->breakers.view();
    }
    Sampling(const Sampling &) = delete;

    py::tuple sample(const Floats &logits, const Ints &history, uint64_t position, const Ints &banned,
                     const std::optional<Total> &total, const std::optional<Bits> &allowed) const {
        if (allowed && allowed->size() * 32 < logits.size()) raise_argument("allowed has a bit for each logit");
        Call call;
        tl_sampling s = settings;
        s.allowed = allowed ? allowed->data() : nullptr;
        s.n_banned = static_cast<int>(banned.size());
        s.banned = banned.data();
        int n = static_cast<int>(logits.size()), n_history = static_cast<int>(history.size());
        // Uninitialized on purpose: it is large.
        std::unique_ptr<char[]> scratch(new char[tl_sample_scratch(n, n_history)]);
        const tl_total of_row = total_of(total);
        tl_sampled sampled{};
        tl_message message;
        tl_status status;
        {
            Released released(call);
            status = tl_sample(&sampled, logits.data(), n, &s, history.data(), n_history, seed, position,
                               total ? &of_row : nullptr, scratch.get(), &message);
        }
        if (status != TL_OK) raise(status, message);
        return py::make_tuple(sampled.token, sampled.logprob);
    }

    // What `sample` takes of a row, but for the total of candidates.
    using Row = std::tuple<const Sampling *, Floats, Ints, uint64_t, Ints, std::optional<Bits>>;

    // For each row what `sample` returns, or the message of the error that it would raise.
    static py::list sample_rows(const std::vector<Row> &rows, int threads) {
        Call call;
        std::vector<tl_choice> choices;
        size_t each_bytes = 0;
        for (const auto &[own, logits, history, position, banned, allowed] : rows) {
            if (allowed && allowed->size() * 32 < logits.size()) raise_argument("allowed has a bit for each logit");
            tl_choice c{};
            c.logits = logits.data();
            c.n = static_cast<int>(logits.size());
            c.history = history.data();
            c.n_history = static_cast<int>(history.size());
            c.sampling = own->settings;
            c.sampling.allowed = allowed ? allowed->data() : nullptr;
            c.sampling.n_banned = static_cast<int>(banned.size());
            c.sampling.banned = banned.data();
            c.seed = own->seed;
            c.position = position;
            each_bytes = std::max(each_bytes, tl_sample_scratch(c.n, c.n_history));
            choices.push_back(c);
        }
        each_bytes = (each_bytes + 63) / 64 * 64; // no two threads write to one line
        threads = std::max(1, std::min(threads, static_cast<int>(choices.size())));
        std::unique_ptr<char[]> scratch(new char[each_bytes * static_cast<size_t>(threads)]);
        {
            Released released(call);
            tl_sample_rows(choices.data(), static_cast<int>(choices.size()), threads, scratch.get(), each_bytes);
        }
        py::list out;
        for (const tl_choice &c : choices) {
            if (c.status == TL_OK)
                out.append(py::make_tuple(c.sampled.token, c.sampled.logprob));
            else
                out.append(py::str(c.message.text));
        }
        return out;
    }

  private:
    static Sequences sorted(Sequences sequences) {
        std::sort(sequences.begin(), sequences.end());
        return sequences;
    }

    const std::vector<int32_t> bias_tokens;
    const std::vector<float> bias;
    const Flat bad_words, breakers;
    const uint64_t seed;
    tl_sampling settings{};
};

py::tuple top_logprobs(const Floats &logits, int k, const std::optional<Total> &total) {
    int n = static_cast<int>(logits.size());
    if (k < 0 || k > n) raise_argument("k must be in 0.." + std::to_string(n));
    Ints tokens(k);
    Floats logprobs(k);
    std::unique_ptr<char[]> scratch(new char[tl_sample_scratch(n, 0)]); // uninitialized on purpose: it is large
    const tl_total of_row = total_of(total);
    tl_message message;
    tl_status status = tl_top_logprobs(tokens.mutable_data(), logprobs.mutable_data(), k, logits.data(), n,
                                       total ? &of_row : nullptr, scratch.get(), &message);
    if (status != TL_OK) raise(status, message);
    return py::make_tuple(tokens, logprobs);
}

template <class F, class... A> double measured(F f, A... arguments) { // a rate that the core measures
    Call call;
    double rate = 0;
    tl_message message;
    tl_status status;
    {
        Released released(call);
        status = f(&rate, arguments..., &message);
    }
    if (status != TL_OK) raise(status, message);
    return rate;
}

double read_bandwidth(size_t n_bytes, int threads, int repetitions) {
    return measured(tl_read_bandwidth, n_bytes, threads, repetitions);
}

double multiply_rate(bool floats, int threads, int repetitions) {
    return measured(tl_multiply_rate, floats, threads, repetitions);
}

// Strings of a file's header, each behind its length in 8 bytes, the lowest first: those of `count` that are whole in `data`
// from `at` on are appended to `found`. Returns where the next one begins; UnicodeDecodeError for one that is no UTF-8.
size_t read_strings(const py::bytes &data, size_t at, size_t count, const py::list &found) {
    const char *bytes = PyBytes_AS_STRING(data.ptr());
    const auto end = static_cast<size_t>(PyBytes_GET_SIZE(data.ptr()));
    for (; count > 0 && at <= end && end - at >= 8; count--) {
        uint64_t length = 0;
        for (size_t i = 8; i-- > 0;) length = length << 8 | static_cast<uint8_t>(bytes[at + i]);
        if (length > end - at - 8) break;
        const auto text = py::reinterpret_steal<py::object>(
            PyUnicode_DecodeUTF8(bytes + at + 8, static_cast<py::ssize_t>(length), nullptr));
        if (!text || PyList_Append(found.ptr(), text.ptr()) != 0) throw py::error_already_set();
        at += 8 + static_cast<size_t>(length);
    }
    return at;
}

// The pieces of SentencePiece's ModelProto: field 1, each a message of its text, score and type (fields 1 to 3).
py::bytes sentencepiece_pieces(const py::list &texts, const Floats &scores, const Bytes &types) {
    const auto n = static_cast<py::ssize_t>(texts.size());
    if (scores.size() != n || types.size() != n) raise_argument("texts, scores and types must be of one length");
    std::string out;
    const auto varint = [](std::string &to, size_t value) {
        for (; value > 0x7f; value >>= 7) to += static_cast<char>(value | 0x80);
        to += static_cast<char>(value);
    };
    for (py::ssize_t i = 0; i < n; i++) {
        py::ssize_t length = 0;
        const char *text = PyUnicode_AsUTF8AndSize(PyList_GET_ITEM(texts.ptr(), i), &length);
        if (!text) throw py::error_already_set();
        std::string head{1 << 3 | 2}, piece{1 << 3 | 2};
        varint(head, static_cast<size_t>(length));
        varint(piece, head.size() + static_cast<size_t>(length) + 7);
        uint32_t score;
        std::memcpy(&score, scores.data() + i, sizeof score);
        char tail[7] = {2 << 3 | 5, 0, 0, 0, 0, 3 << 3, static_cast<char>(types.data()[i])};
        for (int byte = 0; byte < 4; byte++) tail[1 + byte] = static_cast<char>(score >> 8 * byte);
        out.append(piece).append(head).append(text, static_cast<size_t>(length)).append(tail, sizeof tail);
    }
    return out;
}

float logprob(const Floats &logits, int32_t token) {
    if (token < 0 || token >= logits.size()) raise_argument("token " + std::to_string(token) + " is out of range");
    return tl_logprob(logits.data(), static_cast<int>(logits.size()), token);
}

} // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "tinyllm's C core. Use it through tinyllm.backends.";
    m.attr("version") = TINYLLM_VERSION;
    m.attr("abi") = tl_seam_abi();
    m.attr("cuda_build") = TINYLLM_CUDA_BUILD;
    py::module_::import("atexit").attr("register")(py::cpp_function([] { door.close(); }));
    pthread_atfork(nullptr, nullptr, [] { door.calls = 0; }); // of threads that the child does not have
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const std::bad_alloc &) {
            PyErr_SetString(py::module_::import("tinyllm.errors").attr("MemoryLimitError").ptr(), "no memory left");
        }
    });

    py::class_<Cache>(m, "Cache")
        .def(
            "grow", [](Cache &c, int n) { c.run(tl_cache_grow, n); }, py::arg("n_pages"))
        .def(
            "clear_page", [](Cache &c, int page) { c.run(tl_cache_clear_page, page); }, py::arg("page"))
        .def(
            "copy_page", [](Cache &c, int to, int from, int n) { c.run(tl_cache_copy_page, to, from, n); },
            py::arg("to"), py::arg("source"), py::arg("n_tokens"))
        .def(
            "read_page",
            [](Cache &c, int page) {
                py::array_t<uint8_t> bytes(static_cast<py::ssize_t>(c.get()->page_bytes));
                c.run(tl_cache_read_page, page, static_cast<void *>(bytes.mutable_data()));
                return bytes;
            },
            py::arg("page"))
        .def(
            "write_page",
            [](Cache &c, int page, const Bytes &bytes) {
                if (static_cast<size_t>(bytes.size()) != c.get()->page_bytes)
                    raise_argument("a page has " + std::to_string(c.get()->page_bytes) + " bytes");
                c.run(tl_cache_write_page, page, static_cast<const void *>(bytes.data()));
            },
            py::arg("page"), py::arg("bytes"))
        .def(
            "grow_slots", [](Cache &c, int n) { c.run_states(tl_states_grow, n); }, py::arg("n_slots"))
        .def(
            "read_slot",
            [](Cache &c, int slot) {
                py::array_t<uint8_t> bytes(static_cast<py::ssize_t>(c.states ? c.states->slot_bytes : 0));
                c.run_states(tl_states_read, slot, static_cast<void *>(bytes.mutable_data()));
                return bytes;
            },
            py::arg("slot"))
        .def(
            "write_slot",
            [](Cache &c, int slot, const Bytes &bytes) {
                if (c.states && static_cast<size_t>(bytes.size()) != c.states->slot_bytes)
                    raise_argument("a slot has " + std::to_string(c.states->slot_bytes) + " bytes");
                c.run_states(tl_states_write, slot, static_cast<const void *>(bytes.data()));
            },
            py::arg("slot"), py::arg("bytes"))
        .def_property_readonly("n_slots", [](Cache &c) { return c.states ? c.states->n_slots : 0; })
        .def_property_readonly("max_slots", [](Cache &c) { return c.states ? c.states->max_slots : 0; })
        .def_property_readonly("slot_bytes", [](Cache &c) { return c.states ? c.states->slot_bytes : 0; })
        .def_property_readonly("n_pages", [](Cache &c) { return c.get()->n_pages; })
        .def_property_readonly("max_pages", [](Cache &c) { return c.get()->max_pages; })
        .def_property_readonly("page_bytes", [](Cache &c) { return c.get()->page_bytes; })
        .def("close", [](Cache &c) { c.p.reset(), c.states.reset(); });

    py::class_<Model>(m, "Model")
        .def(py::init<const py::dict &, uintptr_t>(), py::arg("config"), py::arg("backend"))
        .def("tie", [](Model &model) { tl_model_tie(model.get()); })
        .def("check", &Model::check)
        .def("forward", &Model::forward, py::arg("cache"), py::arg("tokens"), py::arg("x"), py::arg("positions"),
             py::arg("sequences"), py::arg("page_tables"), py::arg("rows"), py::arg("first_layer"),
             py::arg("last_layer"), py::arg("logits"), py::arg("n_candidates"), py::arg("allowed"), py::arg("adapters"),
             py::arg("states_in"), py::arg("saves"), py::arg("threads"), py::arg("should_stop"))
        .def(
            "adapter", [](const Model &model, int room) { return Adapter((model.get(), model.p), room); },
            py::arg("room"))
        .def_property_readonly("most_candidates",
                               [](const Model &model) { return model.get()->backend->most_candidates; })
        .def("unpack", &Model::unpack, py::arg("name"), py::arg("layer"))
        .def("observe", &Model::observe, py::arg("name"), py::arg("layer"))
        .def("cache", &Model::cache, py::arg("type"), py::arg("max_pages"), py::arg("max_slots"))
        .def_property_readonly("weight_bytes", [](Model &model) { return model.get()->weight_bytes; })
        .def_property_readonly("token_bytes", [](Model &model) { return tl_model_token_bytes(model.get()); })
        .def("close", [](Model &model) { model.p.reset(); });

    py::class_<Adapter>(m, "Adapter")
        .def("add", &Adapter::add, py::arg("name"), py::arg("layer"), py::arg("rank"), py::arg("has_bias"),
             py::arg("scale"), py::arg("a_format"), py::arg("a"), py::arg("b_format"), py::arg("b"))
        .def_property_readonly("n_bytes", [](const Adapter &a) { return a.p->n_bytes; });

    py::class_<Uploads>(m, "Uploads")
        .def(py::init<const Model &, std::vector<Weight>, py::object, int>(), py::arg("model"), py::arg("weights"),
             py::arg("files"), py::arg("threads"))
        .def("wait", &Uploads::wait, py::arg("n"))
        .def("stop", &Uploads::stop);

    m.def("formats", &formats);
    m.def("pack_unpack", &pack_unpack, py::arg("data"), py::arg("format"), py::arg("rows"), py::arg("k"));
    m.def("convert", &convert, py::arg("data"), py::arg("source_format"), py::arg("format"), py::arg("rows"),
          py::arg("k"), py::arg("importance"), py::arg("threads"));
    py::class_<Sampling>(m, "Sampling")
        .def(py::init<float, int, float, float, float, float, float, float, int, float, float, std::vector<int32_t>,
                      std::vector<float>, int, const Sequences &, float, float, int, int, Sequences, uint64_t>(),
             py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("typical_p"),
             py::arg("repetition_penalty"), py::arg("presence_penalty"), py::arg("frequency_penalty"),
             py::arg("penalty_window"), py::arg("xtc_probability"), py::arg("xtc_threshold"), py::arg("bias_tokens"),
             py::arg("bias"), py::arg("no_repeat_ngram_size"), py::arg("bad_words"), py::arg("dry_multiplier"),
             py::arg("dry_base"), py::arg("dry_allowed_length"), py::arg("dry_penalty_last_n"), py::arg("breakers"),
             py::arg("seed"))
        .def("sample", &Sampling::sample, py::arg("logits"), py::arg("history"), py::arg("position"), py::arg("banned"),
             py::arg("total") = py::none(), py::arg("allowed") = py::none());
    m.def("sample_rows", &Sampling::sample_rows, py::arg("rows"), py::arg("threads"));
    m.def("top_logprobs", &top_logprobs, py::arg("logits"), py::arg("k"), py::arg("total") = py::none());
    m.def("logprob", &logprob, py::arg("logits"), py::arg("token"));
    m.def("read_strings", &read_strings, py::arg("data"), py::arg("at"), py::arg("count"), py::arg("found"));
    m.def("sentencepiece_pieces", &sentencepiece_pieces, py::arg("texts"), py::arg("scores"), py::arg("types"));
    m.def("random", &tl_random, py::arg("seed"), py::arg("position"));
    m.def("read_bandwidth", &read_bandwidth, py::arg("n_bytes"), py::arg("threads"), py::arg("repetitions"));
    m.def("multiply_rate", &multiply_rate, py::arg("floats"), py::arg("threads"), py::arg("repetitions"));
    m.def("live_allocations", [] {
        size_t blocks, bytes;
        tl_memory_live(&blocks, &bytes);
        return py::make_tuple(blocks, bytes);
    });
    m.def("isa_names", [] {
        std::vector<std::string> names;
        for (const char *const *n = tl_isa_names(); *n; n++) names.emplace_back(*n);
        return names;
    });
    m.def("isa_name", [] { return std::string(tl_isa_name()); });
    m.def("isa_refused", [] {
        const char *reason = tl_isa_refused();
        return reason ? py::object(py::str(reason)) : py::object(py::none());
    });
    m.def(
        "select_isa", [](const std::string &name) { return tl_isa_select(name.c_str()) == 0; }, py::arg("name"),
        py::call_guard<py::gil_scoped_release>());
}
