ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS tools
# What builds the images and stays out of them: the installer, and the backend that makes wheels of our own sources.
COPY deploy/requirements/build.txt /mnt/build.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /mnt/tools && /mnt/tools/bin/pip install --quiet -r /mnt/build.txt

FROM ${PYTHON_IMAGE}
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
RUN --mount=type=bind,from=tools,source=/mnt/tools,target=/mnt/tools \
    --mount=type=bind,source=deploy/requirements/tensorboard.txt,target=/mnt/requirements.txt \
    --mount=type=cache,target=/root/.cache/uv \
    /mnt/tools/bin/uv venv --quiet --python python3 /venv \
    && /mnt/tools/bin/uv pip install --python /venv -r /mnt/requirements.txt
ARG SAGE_UID=10001
RUN useradd --uid ${SAGE_UID} --user-group --no-create-home --home-dir /tmp sage && install -d -o sage -g sage /sage
COPY deploy/images/healthy.sh /usr/local/bin/sage-healthy
ARG SOURCES=libs/servicekit/src/sage_servicekit
COPY ${SOURCES}/__init__.py ${SOURCES}/names.py ${SOURCES}/tensorboard.py /usr/local/lib/sage/sage_servicekit/
ENV PYTHONPATH=/usr/local/lib/sage PATH=/venv/bin:$PATH HOME=/tmp SAGE_HOME=/sage PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER sage
EXPOSE 6006
CMD ["python", "-m", "sage_servicekit.tensorboard", "--logdir", "/sage/finetune_output", "--host", "0.0.0.0", "--port", "6006", "--reload_interval", "5"]
