"""The span of an answer, as a collector of OpenTelemetry receives it from a live engine."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from vllm import SamplingParams, TokensPrompt
from vllm.tracing import init_tracer

from tests.engine.engines import on, prompts

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def collector():
    """Receive OTLP over HTTP. A process has one tracer for good, so it has one collector."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.received = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
            environment.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)  # vLLM sets it, and children inherit it
            init_tracer("tests", endpoint)
        yield server
        trace.get_tracer_provider().shutdown()
        server.shutdown()


def spans_of(collector, llm, prompt, params):
    """Answer as a server with an `--otlp-traces-endpoint` does; return the spans received, each by attribute."""
    engine = llm.llm_engine
    collector.received.clear()
    engine.output_processor.tracing_enabled = True
    try:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        engine.add_request("traced", TokensPrompt(prompt_token_ids=prompt), params, trace_headers=headers)
        answers = [each for _ in iter(engine.has_unfinished_requests, False) for each in engine.step()]
    finally:
        engine.output_processor.tracing_enabled = False
    assert all(
        answer.kv_transfer_params is None or "melt_loops_asked" not in answer.kv_transfer_params for answer in answers
    )
    trace.get_tracer_provider().force_flush()
    spans = [
        span
        for request in collector.received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.name == "llm_request"  # others are of the engine's start
    ]
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in spans} == {(TRACE, PARENT)}
    return [
        {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes} for span in spans
    ]


@on("token", "chunk")
def test_the_span_of_an_answer_tells_its_depth_and_the_loops_that_ran(served, collector):
    mode = served.model.config.decode_mode
    asked = {"loops": 6, "exit_threshold": 0.5}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False, extra_args=asked)
    [span] = spans_of(collector, served.llm, *prompts(40), params)
    assert span["gen_ai.usage.completion_tokens"] == 12
    assert {name: value for name, value in span.items() if name.startswith("melt.request.")} == {
        "melt.request.loops": 6,
        "melt.request.exit_threshold": 0.5,
        "melt.request.decode_mode": mode,
    }
    assert 1 <= span["melt.usage.loops.mean"] <= span["melt.usage.loops.max"] <= 6
    assert span["melt.usage.loops.mean"] < 6, "tokens must exit early, or this shows little"


@on("token")
def test_each_of_several_answers_has_a_span_with_its_own_loops(served, collector):
    params = SamplingParams(n=3, max_tokens=5, seed=1, detokenize=False, extra_args={"loops": 2})
    spans = spans_of(collector, served.llm, *prompts(40), params)
    assert [span["melt.usage.loops.mean"] for span in spans] == [2.0] * 3
    assert [span["melt.usage.loops.max"] for span in spans] == [2] * 3
