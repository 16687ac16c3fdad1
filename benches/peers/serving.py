#!/usr/bin/env python3
"""prefixd's serving beside transformers + PEFT and beside llama.cpp, on one model, in one run.

usage: serving.py MODEL [--prefixd PATH] [--python PYTHON] [--llama FOLDER --gguf STEM] [--only PART...] [--rounds N] [options]

MODEL is a Hugging Face folder whose weights may be random. PYTHON has torch, transformers and PEFT (peft_serving.py); FOLDER has
llama-server, llama-bench and llama-batched-bench; STEM-BF16.gguf, STEM-Q8_0.gguf and STEM-Q4_0.gguf are MODEL for them. What is
not given is left out. Adapters are random prefixes, made for the run. The parts:

  mixed     32 requests over 8 prefix adapters: prefixd; PEFT, a batch for each adapter; llama-server, 32 slots and no adapters
  distinct  32 requests of one adapter, and of 32
  prefix    32 requests without a prefix, and with one
  many      96 requests of one adapter, and of 1000 by zipf(1) with a KV pool for 100 of them beside the requests; 32 at a time
  hot       16 streams of 96 tokens, alone, and while 100 adapters are loaded evenly over that time; itl once all decode
  memory    weights and KV pool by their size, and resident memory
  goals     decoding at batch 1, 16 and 32 and a prompt of 512, of prefixd and of llama.cpp's own benches; own_cost: what all of prefixd
            but its forward pass costs while 32 requests decode, by that

A request has 64 random tokens in and 32 out, greedy, streamed, measured from the client to the last token. All servers of a part
stay up, idle while another side is measured; the sides take turns in every round, each with prompts that it never had. Prints a
JSON line for each measurement and then tables: medians over the rounds, and in brackets the first row's throughput as a multiple of
the row's. The clients run on the same cores as the servers.

--decoder adds steps of prefixd without a server to `goals`, as llama.cpp's benches are without one. MODEL has the shape of Qwen2-0.5B then.
--device cuda:0 has prefixd and PEFT on a GPU; llama.cpp is left out there.
--quantize int8 adds prefixd with int8 weights, and llama-server with Q8_0 ones.

Needs: grpcio, grpcio-tools, numpy, safetensors, Linux; the executables.
"""
import argparse, bisect, contextlib, http.client, itertools, json, os, pathlib, random, re, statistics, subprocess, tempfile, threading, time

import numpy
from safetensors.numpy import save_file

from prefixd_server import Prefixd, adapters, free_port, inference

PAGE = 16  # tokens of a page of prefixd's KV pool


# Adapters and prompts ------------------------------------------------------------------------------------------------

class Shape:
    def __init__(self, model):
        c = json.loads((model / "config.json").read_text())
        heads = c["num_attention_heads"]
        self.vocab, self.layers = c["vocab_size"], c["num_hidden_layers"]
        self.kv_heads = c.get("num_key_value_heads", heads)
        self.columns = self.kv_heads * c.get("head_dim", c["hidden_size"] // heads)  # of one layer's K


def write_adapters(store, names, shape, tokens):
    """Folders as PEFT's save_pretrained writes them, each there at once."""
    rng = numpy.random.default_rng(0)
    for name in names:
        folder = store.parent / f"{store.name}-{name}"
        folder.mkdir()
        rows = rng.standard_normal((tokens, 2 * shape.layers * shape.columns), numpy.float32) * numpy.float32(0.1)
        save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(dict(
            peft_type="PREFIX_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=tokens, prefix_projection=False, inference_mode=True,
            num_layers=shape.layers, token_dim=shape.columns, num_attention_heads=shape.kv_heads, num_transformer_submodules=1,
            encoder_hidden_size=shape.columns, base_model_name_or_path="")))
        folder.rename(store / name)


def zipf(names, count, rng):
    heap = list(itertools.accumulate(1 / (i + 1) for i in range(len(names))))
    return [names[bisect.bisect(heap, rng.random() * heap[-1])] for _ in range(count)]


# Clients -------------------------------------------------------------------------------------------------------------

class Run:
    """When a run began, and for each of its requests (begun, [time of each token]), in seconds of one clock."""

    def __init__(self, start, seen):
        self.start, self.seen = start, seen

    def figures(self):
        firsts = [1000 * (times[0] - begun) for begun, times in self.seen]
        tokens, wall = sum(len(times) for _, times in self.seen), max(times[-1] for _, times in self.seen) - self.start
        return dict(output_throughput=round(tokens / wall, 2), wall_s=round(wall, 3), median_ttft_ms=round(statistics.median(firsts), 1)) | self.itl(0)

    def itl(self, since):
        """Time between tokens that came at `since` or later."""
        gaps = [1000 * (b - a) for _, times in self.seen for a, b in zip(times, times[1:]) if a >= since]
        at = lambda percent: round(float(numpy.percentile(gaps, percent)), 1)
        return dict(median_itl_ms=at(50), p99_itl_ms=at(99), max_itl_ms=at(100))

    def all_decode(self):
        """When the last request has its first token."""
        return max(times[0] for _, times in self.seen)

    def steady(self):
        """Tokens a second while all requests decode, until the first one's end."""
        first, last = self.all_decode(), min(times[-1] for _, times in self.seen)
        return round(sum(first < t <= last for _, times in self.seen for t in times) / (last - first), 2)


def drive(ask, requests, clients):
    """Runs `ask(request)`, which gives the times of its tokens, from so many clients that have one request at a time each."""
    seen, errors, todo, lock = [], [], iter(requests), threading.Lock()
    gate = threading.Barrier(clients + 1)

    def client():
        gate.wait()
        while not errors:
            with lock:
                request = next(todo, None)
            if request is None:
                return
            begun = time.perf_counter()
            try:
                seen.append((begun, ask(request)))
            except Exception as e:
                errors.append(e)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Run(start, seen)


def ask_prefixd(server, new):
    def ask(request):
        name, ids = request
        message = inference.GenerateRequest(
            adapter_id=name, token_ids=inference.TokenIds(ids=ids), sampling=inference.Sampling(temperature=0),
            stopping=inference.Stopping(max_new_tokens=new, ignore_eos=True), output=inference.Output(token_ids=True))
        times = []
        for answer in server.inference.GenerateStream(message):
            times += [time.perf_counter()] * len(answer.choice.token_ids)
        assert len(times) == new, len(times)
        return times
    return ask


class Llama:
    """A llama-server of our own."""

    def __init__(self, folder, gguf, slots, threads):
        self.port = free_port()
        command = [folder / "llama-server", "-m", gguf, "--port", self.port, "-np", slots, "-c", slots * 256, "-t", threads]
        self.process = subprocess.Popen([str(x) for x in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(self, new):
        def ask(request):
            body = dict(prompt=request[1], n_predict=new, temperature=0, ignore_eos=True, cache_prompt=False, stream=True, return_tokens=True)
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as c:
                c.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
                times = []
                for line in c.getresponse():
                    if line.startswith(b"data: "):
                        event = json.loads(line[6:])
                        # Tokens whose text is not whole come with a later one, or are in the count at the end alone.
                        more = event["tokens_predicted"] - len(times) if event.get("stop") else len(event.get("tokens", []))
                        times += [time.perf_counter()] * more
            assert len(times) == new, len(times)
            return times
        return ask

    def __enter__(self):
        while self.process.poll() is None:
            with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as c:
                c.request("GET", "/health")
                if c.getresponse().status == 200:
                    return self
            time.sleep(0.2)
        raise SystemExit(f"llama-server ended with {self.process.returncode}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


class Peft:
    """peft_serving.py as a child that waits for work."""

    def __init__(self, python, model, store, names, dtype, threads, device):
        script = pathlib.Path(__file__).with_name("peft_serving.py")
        command = [python, script, model, store, *names, "--dtype", dtype, "--threads", threads, "--device", device]
        self.process = subprocess.Popen([str(x) for x in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"peft_serving.py ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, requests, new):
        self.process.stdin.write(json.dumps({"requests": requests, "new": new}) + "\n")
        self.process.stdin.flush()
        wall = self.answer()["wall_s"]
        return dict(output_throughput=round(len(requests) * new / wall, 2), wall_s=wall)

    def __enter__(self):
        self.answer()
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def rss(process, key="VmRSS"):
    """MiB."""
    with open(f"/proc/{process.pid}/status") as status:
        return round(int(next(line for line in status if line.startswith(key)).split()[1]) / 1024)


def cpu(process):
    """Seconds that a prefixd's threads have run: those of the model, and all others."""
    seconds = [0.0, 0.0]
    for task in pathlib.Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = (task / "comm").read_text()
            seconds[not name.startswith(("prefixd-engine", "prefixd-cpu"))] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


# Parts ---------------------------------------------------------------------------------------------------------------

class Bench:
    def __init__(self, a, folder):
        self.a, self.folder, self.shape, self.rng = a, folder, Shape(a.model), random.Random(0)
        self.found = {}  # part -> side -> figures of each round

    def store(self, part, count):
        store, names = self.folder / part, [f"a{i:04}" for i in range(count)]
        store.mkdir()
        write_adapters(store, names, self.shape, self.a.prefix)
        return store, names

    def serve(self, store, *options):
        return Prefixd(self.a.prefixd, self.a.model, store, "--dtype", self.a.dtype, "--threads", self.a.threads, "--device", self.a.device, *options)

    def requests(self, names, tokens=None):
        """A prompt that nobody had before for each name."""
        draw = lambda: [self.rng.randrange(300, self.shape.vocab - 10) for _ in range(tokens or self.a.input)]
        return [(name, draw()) for name in names]

    def ours(self, server, names, new=None):
        return drive(ask_prefixd(server, new or self.a.output), self.requests(names), min(len(names), self.a.requests))

    def note(self, part, side, figures):
        self.found.setdefault(part, {}).setdefault(side, []).append(figures)
        print(json.dumps(dict(part=part, side=side) | figures | dict(load=round(os.getloadavg()[0], 2))), flush=True)

    def turns(self, part, sides):
        """Each server once before it counts, then all sides in turn, every second round from the last to the first."""
        for name, side in sides.items():
            if not name.startswith("llama.cpp"):  # programs that start anew each time
                side()
        for i in range(self.a.rounds):
            for name in list(sides)[:: -1 if i % 2 else 1]:
                self.note(part, name, sides[name]())

    def mixed(self):
        a = self.a
        store, names = self.store("mixed", 8)
        share = [names[i % len(names)] for i in range(a.requests)]
        with contextlib.ExitStack() as up:
            sides = {}
            for kind, options in [(a.dtype, ())] + [(q, ("--quantize", q)) for q in a.quantize]:
                server = up.enter_context(self.serve(store, *options))
                sides[f"prefixd {kind}"] = lambda s=server: self.ours(s, share).figures() | {"rss_mib": rss(s.process)}
            if a.python:
                peft = up.enter_context(Peft(a.python, a.model, store, names, a.dtype, a.threads, a.device))
                sides[f"PEFT {a.dtype}"] = lambda: peft.run(self.requests(share), a.output) | {"rss_mib": rss(peft.process)}
            for kind in ["BF16"] * bool(a.llama) + ["Q8_0"] * bool(a.llama and a.quantize):
                llama = up.enter_context(Llama(a.llama, f"{a.gguf}-{kind}.gguf", a.requests, a.threads))
                run = lambda l=llama: drive(l.ask(a.output), self.requests(share), a.requests)
                sides[f"llama-server {kind}"] = lambda l=llama, run=run: run().figures() | {"rss_mib": rss(l.process)}
            self.turns("mixed", sides)

    def distinct(self):
        store, names = self.store("distinct", self.a.requests)
        with self.serve(store) as server:
            one = names[:1] * len(names)
            self.turns("distinct", {"one adapter": lambda: self.ours(server, one).figures(),
                                    f"{len(names)} adapters": lambda: self.ours(server, names).figures()})

    def prefix(self):
        store, names = self.store("prefix", 1)
        with self.serve(store) as server:
            count = self.a.requests
            self.turns("prefix", {"no prefix": lambda: self.ours(server, [""] * count).figures(),
                                  f"prefix of {self.a.prefix}": lambda: self.ours(server, names * count).figures()})

    def many(self):
        a = self.a
        store, names = self.store("many", 1000)
        pages = lambda tokens: -(-tokens // PAGE)
        tokens = PAGE * (100 * pages(a.prefix) + a.requests * pages(a.input + a.output))
        count = 3 * a.requests
        with self.serve(store, "--kv-tokens", tokens) as server:
            def zipfian():
                before = server.stats()
                run = self.ours(server, zipf(names, count, self.rng)).figures()
                after = server.stats()
                change = lambda key: getattr(after, key) - getattr(before, key)
                return run | dict(hits=change("prefix_hits"), misses=change("prefix_misses"), evictions=change("prefix_evictions"),
                                  resident=after.adapters_resident, registered=after.adapters_registered)
            self.turns("many", {"one adapter": lambda: self.ours(server, names[:1] * count).figures(), "1000, zipf 1": zipfian})

    def hot(self):
        store, names = self.store("hot", 1)
        streams, new = names * 16, 96
        with self.serve(store) as server:
            fresh = [f"b{i:04}" for i in range(100)]
            write_adapters(store, fresh, self.shape, self.a.prefix)
            walls, took = [], []

            def quiet():
                run = self.ours(server, streams, new)
                figures = run.figures() | run.itl(run.all_decode())
                walls.append(figures["wall_s"])
                return figures

            def load():
                took.clear()
                begun, pause = time.perf_counter(), statistics.median(walls) / (len(fresh) + 10)
                for i, name in enumerate(fresh):
                    time.sleep(max(0, begun + (i + 5) * pause - time.perf_counter()))
                    start = time.perf_counter()
                    server.adapters.LoadAdapter(adapters.LoadAdapterRequest(adapter_id=name))
                    took.append(1000 * (time.perf_counter() - start))

            def loading():
                loader = threading.Thread(target=load)
                loader.start()
                run = self.ours(server, streams, new)
                loader.join()
                for name in fresh:
                    server.adapters.UnloadAdapter(adapters.UnloadAdapterRequest(adapter_id=name))
                return run.figures() | run.itl(run.all_decode()) | dict(loads=len(took), median_load_ms=round(statistics.median(took), 1), max_load_ms=round(max(took), 1))
            self.turns("hot", {"quiet": quiet, f"{len(fresh)} loads": loading})

    def memory(self):
        a = self.a
        store, names = self.store("memory", 8)
        for kind, options in [(a.dtype, ())] + [(q, ("--quantize", q)) for q in a.quantize]:
            with self.serve(store, "--kv-tokens", 16384, *options) as server:
                start = rss(server.process)
                for _ in range(a.rounds):
                    self.ours(server, [names[i % len(names)] for i in range(a.requests)])
                weights = server.info.model.num_parameters * {"f32": 4, "bf16": 2, "int8": 1}[kind] / 2**20
                pool = server.info.limits.kv_tokens * 2 * self.shape.layers * self.shape.columns * 4 / 2**20
                end = rss(server.process)
                self.note("memory", f"prefixd {kind}", dict(weights_mib=round(weights), kv_pool_mib=round(pool), rss_started_mib=start, rss_mib=end,
                                                          peak_mib=rss(server.process, "VmHWM"), times=round(end / (weights + pool), 3)))

    def own_cost(self, server, count):
        """What all but the forward pass costs while `count` requests decode, as a share of that: the rest of the engine's steps, and the
        time of the server's other threads, by the number of the model's threads, which they share the cores with."""
        samples, done = [], threading.Event()

        def sample():
            while not done.wait(0.25):
                stats = server.stats()
                samples.append((time.perf_counter(), stats.forward_seconds, stats.step_seconds, cpu(server.process)[1]))
        sampler = threading.Thread(target=sample)
        sampler.start()
        run = self.ours(server, [""] * count, 160)
        done.set()
        sampler.join()
        first, last = run.all_decode(), min(times[-1] for _, times in run.seen)
        inside = [s for s in samples if first <= s[0] <= last]
        forward, step, others = (inside[-1][i] - inside[0][i] for i in (1, 2, 3))
        return {"own_cost": round((step - forward + others / self.a.threads) / forward, 4)}

    def decoder(self, kind, sizes):
        """Steps without a server, as llama.cpp's benches measure theirs; but each row has one of 8 prefixes of --prefix rows."""
        rows = [f"rows={n}" for n in sizes]
        done = subprocess.run([self.a.decoder, kind, *rows, "rows=512", "adapters=8", f"prefix={self.a.prefix}"], capture_output=True, text=True, check=True)
        decode = re.findall(r"^decode +(\d+) rows.* ([0-9.]+) tokens/s", done.stdout, re.M)
        prefill = re.findall(r"^prefill 512 rows:.* (\d+) tokens/s", done.stdout, re.M)
        return {f"decode_{n}": float(rate) for n, rate in decode} | {"prefill_512": float(prefill[0])}

    def goals(self):
        a = self.a
        store, _ = self.store("goals", 0)
        sizes = (1, 16, 32)
        with contextlib.ExitStack() as up:
            sides = {}
            for kind, options in [(a.dtype, ())] + [(q, ("--quantize", q)) for q in a.quantize]:
                def ours(server=up.enter_context(self.serve(store, *options))):
                    found = {f"decode_{n}": self.ours(server, [""] * n, 48).steady() for n in sizes}
                    (begun, times), = drive(ask_prefixd(server, 1), self.requests([""], 512), 1).seen
                    return found | {"prefill_512": round(512 / (times[0] - begun), 1)} | self.own_cost(server, 32)
                sides[f"prefixd {kind}"] = ours
                def alone(kind=kind):
                    return self.decoder(kind, sizes)
                if a.decoder:
                    sides[f"prefixd {kind}, decoder alone"] = alone
            for kind in ("BF16", "Q8_0", "Q4_0") if a.llama else ():
                def theirs(gguf=f"{a.gguf}-{kind}.gguf"):
                    ask = lambda tool, *more: lines_of([a.llama / tool, "-m", gguf, "-t", a.threads, *more])
                    decode = ask("llama-batched-bench", "-c", 4096, "-b", 2048, "-ub", 512, "-npp", a.input, "-ntg", 48,
                                 "-npl", ",".join(map(str, sizes)), "--output-format", "jsonl")
                    prefill, = ask("llama-bench", "-p", 512, "-n", 0, "-r", 1, "-o", "jsonl")
                    return {f"decode_{r['pl']}": round(r["speed_tg"], 2) for r in decode} | {"prefill_512": round(prefill["avg_ts"], 1)}
                sides[f"llama.cpp {kind}"] = theirs
            self.turns("goals", sides)


def lines_of(command):
    """The JSON lines among what a program prints."""
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def tables(found):
    for part, sides in found.items():
        medians = {side: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for side, rounds in sides.items()}
        keys = list(dict.fromkeys(k for m in medians.values() for k in m))
        first = next(iter(medians.values()))
        # The figures of the goals are throughputs, but for one.
        rated = set(keys) - {"own_cost"} if part == "goals" else {"output_throughput"}
        yield f"\n{part}, medians of {max(map(len, sides.values()))}; (first row / this row)"
        yield "| side | " + " | ".join(keys) + " |"
        yield "|---" * (len(keys) + 1) + "|"
        for side, m in medians.items():
            cell = lambda k: f"{m[k]:g}" + (f" ({first[k] / m[k]:.2f})" if k in rated else "") if k in m else ""
            yield f"| {side} | " + " | ".join(map(cell, keys)) + " |"


PARTS = ("mixed", "distinct", "prefix", "many", "hot", "memory", "goals")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=pathlib.Path)
    p.add_argument("--prefixd", type=pathlib.Path, default=pathlib.Path("target/release/prefixd"))
    p.add_argument("--python", help="a Python with torch, transformers and PEFT")
    p.add_argument("--llama", type=pathlib.Path, help="folder of llama.cpp's programs"), p.add_argument("--gguf", help="MODEL as GGUF, without -KIND.gguf")
    p.add_argument("--decoder", type=pathlib.Path, help="benches/decoder.rs, built: `cargo bench --no-run --bench decoder` says where")
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--rounds", type=int, default=5), p.add_argument("--threads", type=int, default=2)
    p.add_argument("--dtype", choices=("f32", "bf16"), default="bf16"), p.add_argument("--quantize", nargs="*", default=[], choices=("int8",))
    p.add_argument("--requests", type=int, default=32), p.add_argument("--prefix", type=int, default=32, help="virtual tokens")
    p.add_argument("--input", type=int, default=64), p.add_argument("--output", type=int, default=32)
    p.add_argument("--device", default="cpu", help="cpu or cuda:N")
    a = p.parse_args()
    if a.llama and a.device != "cpu":
        p.error("--llama is for the CPU")
    if bool(a.llama) != bool(a.gguf):
        p.error("--llama and --gguf go together")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(a, pathlib.Path(folder))
        for part in a.only:
            getattr(bench, part)()
    print("\n".join(tables(bench.found)))


main()
