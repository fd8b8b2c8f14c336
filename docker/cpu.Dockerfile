# fastoss without a GPU: the tiny model, checks of data and recipes, the demo of a small run.
# docker build -f docker/cpu.Dockerfile -t fastoss:cpu .
# The Python that CI tests with.
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Nobody needs to be root to train; the volumes below belong to this user.
RUN useradd --create-home --uid 10001 fastoss \
    && mkdir -p /work/runs /cache \
    && chown -R fastoss:fastoss /work /cache \
    && python3 -m venv "$VIRTUAL_ENV"

WORKDIR /src

# torch alone from its CPU index, and nothing else from there; all the rest from PyPI, as constraints.txt pins it.
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0

# The dependencies before the code: a changed line of code installs nothing again.
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY fastoss/__init__.py fastoss/__init__.py
RUN pip install -c constraints.txt ".[demo,serve,tensorboard,gguf]"

COPY fastoss fastoss
RUN pip install --no-deps --force-reinstall .

WORKDIR /work
COPY app.py ./
COPY recipes recipes

# What can be made again, or fetched again, lies in /cache; what was trained lies in /work/runs.
ENV FASTOSS_CACHE=/cache/fastoss \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    OMP_NUM_THREADS=4
VOLUME ["/work/runs", "/cache"]

# By number: an orchestrator that refuses root can see that it is none.
USER 10001

# The demo's port. A training or a check publishes nothing, and switches the health check off (--no-healthcheck).
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]

CMD ["fastoss", "--help"]
