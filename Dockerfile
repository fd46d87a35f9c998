# melt-serve as a container: `docker build -t melt-serve .` for CPUs, `--target gpu` for CUDA.
#
#   docker run -p 8000:8000 melt-serve                                            the bundled checkpoint
#   docker run -p 8000:8000 -v ./my-melt:/models/x:ro melt-serve --model /models/x   another one
#   docker run -p 8000:8000 -e VLLM_API_KEY=... melt-serve                        asks for a key
#
# deploy/verify_image.sh builds the CPU image and tries all of this.

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.32.0


FROM ${VLLM_IMAGE} AS gpu
WORKDIR /opt/melt-serve
COPY pyproject.toml README.md LICENSE ./
COPY melt_serve melt_serve
# vLLM's image has all that the package needs.
RUN python3 -m pip install --no-cache-dir --no-deps . \
    && useradd --uid 10001 --create-home melt && install -d -o melt -g melt /home/melt/.cache
ENV HOME=/home/melt HF_HOME=/home/melt/.cache/huggingface MELT_HOST=0.0.0.0 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/melt
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/melt/ready', timeout=4)"]
ENTRYPOINT ["melt-serve", "serve"]


FROM ${PYTHON_IMAGE} AS cpu
# PyTorch publishes its CPU wheels on an index of its own.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH
# torch.compile needs a compiler and Python's headers; vLLM's CPU build needs libnuma and tcmalloc.
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
        g++ libc6-dev libgomp1 libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home melt && install -d -o melt -g melt /home/melt/.cache
WORKDIR /opt/melt-serve
COPY deploy/requirements.txt ./
# Every file that is installed is one whose hash is known. In two steps, as the Makefile says.
RUN python3 -m venv /opt/venv \
    && sed -n '/^torch==/,/[^\\]$/p' requirements.txt > torch.txt \
    && pip install --no-cache-dir --quiet --retries 0 --no-deps --require-hashes \
        --extra-index-url "$TORCH_CPU_INDEX" -r torch.txt \
    && pip install --no-cache-dir --quiet --no-deps --require-hashes --only-binary :all: -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY melt_serve melt_serve
RUN pip install --no-cache-dir --quiet --no-deps --no-build-isolation . && rm -rf build
ENV HOME=/home/melt HF_HOME=/home/melt/.cache/huggingface MELT_HOST=0.0.0.0 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/melt
EXPOSE 8000
# Running requests end, then the server: give it more than its --shutdown-timeout of 30 seconds (docker stop -t 40).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/melt/ready', timeout=4)"]
ENTRYPOINT ["melt-serve", "serve"]
