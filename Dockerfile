# The page in a container: a Hugging Face Docker Space, or any machine.
#
#   docker build -t mtad . && docker run --rm -p 7860:7860 mtad
#   docker run --rm -p 7860:7860 --gpus all mtad            with NVIDIA's container toolkit
#   docker run --rm -p 7860:7860 -e MTAD_HOSTED=1 mtad      for strangers: small limits, one pair
#
# The build needs the network. The start needs none, and no write outside /tmp.
FROM python:3.12-slim-bookworm

# The CPU's kernels are compiled at the first start, for the processor that is there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Spaces run a container as this user.
RUN useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user/app
ENV PATH=/home/user/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MTAD_HOME=/home/user/models

COPY --chown=user requirements.txt ./
RUN python -m venv /home/user/venv && pip install --no-cache-dir -r requirements.txt

COPY --chown=user mtad ./mtad
RUN python -m mtad fetch
COPY --chown=user assets ./assets
COPY --chown=user app.py LICENSE ./

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860 \
    GRADIO_ANALYTICS_ENABLED=False \
    HF_HUB_OFFLINE=1
EXPOSE 7860
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/config', timeout=4)"]
CMD ["python", "app.py"]
