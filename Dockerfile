# The core of bitalloy on ONNX Runtime, without a deep-learning framework. Not built in CI, which has no Docker.
#
#   docker build -t bitalloy .
#   docker run --rm -v "$PWD:/data" bitalloy run model.onnx --data images/ --latency 0.7x
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN python -m venv /opt/bitalloy && /opt/bitalloy/bin/pip install --no-cache-dir --no-compile .

FROM python:3.13-slim
COPY --from=build /opt/bitalloy /opt/bitalloy
# Latency is that of the cores the container may use: give it whole ones, such as --cpuset-cpus 0-3.
RUN useradd --create-home bitalloy
USER bitalloy
WORKDIR /data
ENTRYPOINT ["/opt/bitalloy/bin/bitalloy"]
