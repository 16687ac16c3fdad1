"""Drives a served prefixd from Python, knowing nothing of it but its address: messages come by reflection.

usage: client.py PATH_OF_PREFIXD
"""

from __future__ import annotations

import concurrent.futures
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["agenda", "answer", "booking", "describe", "formal", "sentiment", "slots", "topic"]
checks = 0


def check(condition: bool, what: str) -> None:
    """Counts a check; ends the run with its name if it fails."""
    global checks
    checks += 1
    if not condition:
        sys.exit(f"failed: {what}")


class Client:
    """A client made from the server's own description."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", 64 << 20)])
        grpc.channel_ready_future(self.channel).result(timeout=30)
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def message(self, name: str):
        """The class of a message."""
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))

    def call(self, service: str, method: str, fields=None, *, metadata=(), timeout=60):
        """A unary call, or a list of messages of a streaming one."""
        described = self.pool.FindServiceByName(service).FindMethodByName(method)
        request = message_factory.GetMessageClass(described.input_type)
        reply = message_factory.GetMessageClass(described.output_type)
        kind = f"{'stream' if described.client_streaming else 'unary'}_{'stream' if described.server_streaming else 'unary'}"
        stub = getattr(self.channel, kind)(
            f"/{service}/{method}", request_serializer=lambda m: m.SerializeToString(), response_deserializer=reply.FromString
        )
        if described.client_streaming:
            return stub((request(**f) for f in fields), metadata=metadata, timeout=timeout)
        answer = stub(request(**(fields or {})), metadata=metadata, timeout=timeout)
        return list(answer) if described.server_streaming else answer

    def generate(self, adapter: str, prompt: str, **fields):
        """The answer of one Generate."""
        request = {"adapter_id": adapter, "prompt": prompt, **fields}
        return self.call("prefixd.v1.InferenceService", "Generate", request)

    def raw(self, path: str, data: bytes) -> bytes:
        """A unary call in bytes, past every client-side check."""
        stub = self.channel.unary_unary(path, request_serializer=lambda b: b, response_deserializer=lambda b: b)
        return stub(data, timeout=30)

    def code(self, call) -> tuple[grpc.StatusCode, str]:
        """The status that a call fails with."""
        try:
            call()
        except grpc.RpcError as e:
            return e.code(), e.details()
        return grpc.StatusCode.OK, ""


def examples(task: str) -> list[dict]:
    """Held-out inputs and targets of a shipped adapter."""
    return [json.loads(line) for line in (ROOT / "adapters" / task / "examples.jsonl").read_text().splitlines()]


def listed_services(client: Client, version: str) -> set[str]:
    """Services by reflection of a version. The messages of v1 and v1alpha are the same on the wire."""
    stub = client.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    answer = next(stub(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    return {service.name for service in answer.list_services_response.service}


def reflection_and_health(client: Client) -> None:
    expected = {f"prefixd.v1.{name}Service" for name in ("Inference", "Adapter", "Server")} | {"grpc.health.v1.Health"}
    for version in ("v1", "v1alpha"):
        check(expected <= listed_services(client, version), f"reflection {version} lists {expected}")
    for service in ("", "prefixd.v1.InferenceService"):
        status = client.call("grpc.health.v1.Health", "Check", {"service": service})
        check(status.status == 1, f"health of {service!r} is SERVING")


def mixed_burst(client: Client) -> None:
    work = [(task, e) for task in TASKS for e in examples(task)[:8]]
    alone = {(task, e["input"]): client.generate(task, e["input"]).choices[0].text for task, e in work[::8]}
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda w: client.generate(w[0], w[1]["input"]), work))
    right = sum(a.choices[0].text.strip() == e["target"] for a, (_, e) in zip(answers, work))
    shared = max(a.timings.batch_max_adapters for a in answers)
    print(f"mixed burst: {right} of {len(work)} right, up to {shared} adapters in one batch")
    check(right >= 0.9 * len(work), "nine of ten answers are right")
    check(shared >= 4, "adapters share batches")
    for a, (task, e) in zip(answers, work):
        check(alone.get((task, e["input"]), a.choices[0].text) == a.choices[0].text, "alone and in the burst say the same")


def stacks_tasks_conversations(client: Client) -> None:
    prompt, names = examples("sentiment")[0]["input"], {"prefix_adapter_ids": ["describe"]}
    stacked = client.generate("sentiment", prompt, **names)
    lengths = [client.generate(task, prompt).usage.prefix_tokens for task in ("describe", "sentiment")]
    check(stacked.usage.prefix_tokens == sum(lengths), "a stack is as long as its prefixes")
    check([a.adapter_id for a in stacked.prefix_adapters] == ["describe"], "the answer names the stack")
    code, _ = client.code(lambda: client.generate("describe", prompt, prefix_adapter_ids=["sentiment"]))
    check(code == grpc.StatusCode.FAILED_PRECONDITION, "stored K and V do not stand after virtual tokens")
    code, text = client.code(lambda: client.generate("sentiment", prompt, task_id=1))
    check(code == grpc.StatusCode.INVALID_ARGUMENT and "task_id" in text, "an adapter without tasks has no task 1")
    conversation = {"messages": {"messages": [{"role": "user", "content": "hi"}]}}
    request = lambda: client.call("prefixd.v1.InferenceService", "Generate", conversation)  # noqa: E731
    code, text = client.code(request)
    check(code == grpc.StatusCode.FAILED_PRECONDITION and "chat template" in text, "the demo model has no chat template")


def streaming(client: Client) -> None:
    prompt = examples("describe")[0]["input"]
    whole = client.generate("describe", prompt)
    request = {"adapter_id": "describe", "prompt": prompt}
    pieces = client.call("prefixd.v1.InferenceService", "GenerateStream", request, metadata=[("x-request-id", "py-1")])
    check("".join(p.choice.text for p in pieces) == whole.choices[0].text, "a stream is the unary answer")
    check(all(p.request_id == "py-1" for p in pieces), "the request id is the client's")
    check(pieces[-1].usage.generated_tokens == whole.usage.generated_tokens, "the last piece has the usage")


def hot_loading(client: Client) -> None:
    def upload(generation: int, replace: bool):
        folder = ROOT / "models" / "demo" / "hot-load" / f"gen-{generation}"
        files = [f for f in sorted(folder.iterdir()) if f.name != "README.md"]
        parts = [{"header": {"adapter_id": "from-python", "replace": replace}}]
        parts += [{"chunk": {"name": f.name, "data": f.read_bytes()}} for f in files]
        return client.call("prefixd.v1.AdapterService", "UploadAdapter", parts).adapter

    prompt = examples("sentiment")[0]["input"]
    first = upload(1, False)
    said = client.generate("from-python", prompt)
    check(said.adapter.generation == first.generation, "the first generation answers")
    code, _ = client.code(lambda: upload(2, False))
    check(code == grpc.StatusCode.ALREADY_EXISTS, "an upload replaces only when asked")
    second = upload(2, True)
    check(second.generation > first.generation and second.digest != first.digest, "a second generation")
    check(client.generate("from-python", prompt).adapter.generation == second.generation, "the second one answers")
    client.call("prefixd.v1.AdapterService", "UnloadAdapter", {"adapter_id": "from-python", "delete": True})
    code, _ = client.code(lambda: client.generate("from-python", prompt))
    check(code == grpc.StatusCode.NOT_FOUND, "gone after unloading")


def training(client: Client) -> None:
    """A task is trained by RPC, watched, served and measured."""
    service = "prefixd.v1.TrainingService"
    data = [{"input": e["input"], "targets": [e["target"]]} for e in examples("sentiment")]
    card = (ROOT / "adapters" / "sentiment" / "task.toml").read_text()
    job = client.call(service, "CreateTrainingJob", {
        "adapter_id": "from-python", "data": {"inline": {"examples": data}}, "task_card": card, "load": True,
        "settings": {"max_steps": 12, "batch_size": 4, "target_template": " {{ target }}\n", "num_virtual_tokens": 8},
    }).job
    check(job.job_id.startswith("job-") and job.total_steps == 12, "a job is created")
    events = client.call(service, "WatchTrainingJob", {"job_id": job.job_id})
    steps = [e.step for e in events if e.WhichOneof("event") == "step"]
    check([s.step for s in steps] == list(range(1, 13)), "every step is seen once, in order")
    last = events[-1].job
    check(last.generation > 0 and not last.error, f"the last message is the job that succeeded: {last.error}")
    answer = client.generate("from-python", data[0]["input"])
    check(answer.adapter.generation == last.generation, "the new adapter answers")
    measured = client.call(service, "Evaluate", {"adapter_id": "from-python", "data": {"inline": {"examples": data}}})
    check(measured.scores.exact_match >= measured.base_scores.exact_match, "it is no worse than the bare base")
    listed = client.call(service, "ListTrainingJobs").jobs
    check(job.job_id in [j.job_id for j in listed], "the job is listed")
    bad = {"adapter_id": "x", "data": {"inline": {"examples": [{"input": "a"}]}}}
    code, text = client.code(lambda: client.call(service, "CreateTrainingJob", bad))
    check(code == grpc.StatusCode.INVALID_ARGUMENT and "target" in text, "an example without target is named")


def malformed(client: Client) -> None:
    generate = "/prefixd.v1.InferenceService/Generate"
    not_utf8 = b"\x12\x02\xff\xfe"  # field 2, a string of two bytes that are no UTF-8
    code, text = client.code(lambda: client.raw(generate, not_utf8))
    check(code == grpc.StatusCode.INVALID_ARGUMENT, f"invalid UTF-8 is INVALID_ARGUMENT, not {code}: {text}")
    code, _ = client.code(lambda: client.raw(generate, b"\x0a\xff\xff\xff\xff\x0f"))
    check(code == grpc.StatusCode.INVALID_ARGUMENT, f"a truncated message is INVALID_ARGUMENT, not {code}")
    request = client.message("prefixd.v1.GenerateRequest")(adapter_id="sentiment", prompt=examples("sentiment")[0]["input"])
    unknown = request.SerializeToString() + b"\xfa\x3f\x03abc"  # field 1023
    reply = client.message("prefixd.v1.GenerateResponse").FromString(client.raw(generate, unknown))
    check(reply.choices[0].text.strip() == examples("sentiment")[0]["target"], "unknown fields are ignored")
    code, text = client.code(lambda: client.generate("sentiment", "x", sampling={"temperature": -1}))
    check(code == grpc.StatusCode.INVALID_ARGUMENT and "temperature" in text and "-1" in text, text)


def metrics(port: int) -> None:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    for name in ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds", "adapters_resident"):
        check(f"prefixd_{name}" in text, f"/metrics has prefixd_{name}")


def drained(server: subprocess.Popen, client: Client) -> None:
    request = {"prompt": "on monday", "stopping": {"max_new_tokens": 240, "ignore_eos": True}}
    stub = concurrent.futures.ThreadPoolExecutor(1).submit(
        client.call, "prefixd.v1.InferenceService", "GenerateStream", request
    )
    while client.call("prefixd.v1.ServerService", "GetStats").running == 0 and not stub.done():
        pass
    server.send_signal(signal.SIGTERM)
    pieces = stub.result(timeout=60)
    check(pieces[-1].choice.finish_reason != 0, "a running stream ends as it should")
    check(server.wait(timeout=60) == 0, "SIGTERM ends with exit 0")


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    port = free_port()
    command = [sys.argv[1], "serve", "--listen", "127.0.0.1:0", "--metrics-listen", f"127.0.0.1:{port}", "--output", "json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = json.loads(server.stdout.readline())["address"]
        client = Client(address)
        for test in (reflection_and_health, mixed_burst, stacks_tasks_conversations, streaming, hot_loading, training, malformed):
            test(client)
            print(f"ok {test.__name__}")
        metrics(port)
        print("ok metrics")
        drained(server, client)
        print("ok drained")
    finally:
        server.kill()
    print(f"{checks} passed, 0 failed")


if __name__ == "__main__":
    main()
