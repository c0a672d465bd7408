# mmq in vLLM's image: quantize and serve with one set of libraries.
#
#   docker build -t mmq .
#   docker run --rm --gpus all -v "$PWD/artifacts:/work/artifacts" mmq \
#     export --recipe llava-w4-vit8 --model demo-llava --out artifacts/demo-llava-w4-vit8
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v "$PWD/artifacts:/work/artifacts:ro" mmq \
#     serve artifacts/demo-llava-w4-vit8 --host 0.0.0.0 --port 8000
ARG VLLM_VERSION=v0.32.0
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY serving/cpu serving/cpu
COPY exporter exporter
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:${VLLM_VERSION}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# vLLM's kernels were built for the image's torch, transformers and safetensors, so these versions must not change.
# mmq is installed without dependencies; missing small ones are added with constraints that pin all installed packages.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==' > /tmp/installed.txt \
    && python3 -m pip install --no-cache-dir --no-deps /wheels/mmq_vlm-*.whl \
    && python3 -m pip install --no-cache-dir -c /tmp/installed.txt \
       "click>=8.1" "rich>=13" "pydantic>=2.7,<3" "PyYAML>=6" "jinja2>=3.1" "httpx2>=2.10" "imagehash>=4.3" \
    && rm /tmp/installed.txt \
    && mmq --help > /dev/null

COPY --chmod=755 serving/launch.sh serving/smoke.py /usr/local/bin/
RUN useradd --create-home --uid 10001 mmq && mkdir /work && chown mmq:mmq /work
USER 10001
WORKDIR /work
ENTRYPOINT ["mmq"]
CMD ["--help"]
