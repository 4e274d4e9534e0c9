# Two images from one recipe: the server of a federation and the client of one organisation.
#
#   docker build --target server --tag apiary-server .
#   docker build --target client --tag apiary-client .
#
# torch comes with the GPU libraries of the default package index. A build that has none of them:
# --build-arg TORCH_INDEX=<address of PyTorch's CPU index>.

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python -m venv /opt/apiary
ENV PATH=/opt/apiary/bin:$PATH
# The libraries go in before our own files, so that a change of ours does not fetch them again.
COPY pyproject.toml constraints.txt ./
# torch's version does stand in constraints.txt.
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)" \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > wanted.txt \
    && pip install --constraint constraints.txt --requirement wanted.txt
COPY LICENSE README.md ./
COPY apiary apiary
COPY client client
COPY deploy deploy
COPY server server
COPY simulation simulation
COPY strategies strategies
RUN pip install --no-deps .


FROM python:3.11-slim-bookworm AS runtime
# tini reaps what Flower's processes leave behind; a daemon as PID 1 would not.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/apiary --create-home apiary \
    && install --directory --owner=apiary /var/lib/apiary/models /var/lib/apiary/state
COPY --from=build /opt/apiary /opt/apiary
# Nothing is fetched or sent at run time: models come from the volume, and dependencies from the image.
# To fill the volume once, where there is a network:
#   docker run --rm --env HF_HUB_OFFLINE=0 --volume models:/var/lib/apiary/models \
#     --entrypoint hf apiary-client download ORGANISATION/MODEL
ENV PATH=/opt/apiary/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/apiary/models \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    FLWR_HOME=/var/lib/apiary/state/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
WORKDIR /var/lib/apiary/state
VOLUME ["/var/lib/apiary/models", "/var/lib/apiary/state"]
USER 10001


# Both run on a kit that `apiary deploy init` made, mounted read-only; what must survive a restart is in the state
# volume. The kit's keys are for their owner alone: give the folder to user 10001, or run with --user.
#   docker run --publish 8443:8443 --volume ./server:/kit:ro --volume state:/var/lib/apiary/state apiary-server
# 8443 stands for the port of the kit. To start a run: docker exec ... apiary deploy submit /kit CONFIG --state ...
FROM runtime AS server
EXPOSE 8443
ENV HEALTH_URL=https://127.0.0.1:8443/health
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, ssl, urllib.request as web; web.urlopen(os.environ['HEALTH_URL'], timeout=4, context=ssl._create_unverified_context())"]
ENTRYPOINT ["tini", "-g", "--", "apiary", "deploy", "server", "/kit", "--state", "/var/lib/apiary/state"]


# It publishes no port, and its data is best mounted read-only:
#   docker run --volume ./north:/kit:ro --volume ./rows:/data:ro --volume state:/var/lib/apiary/state apiary-client
FROM runtime AS client
ENV HEALTH_URL=http://127.0.0.1:9094/health
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["tini", "-g", "--", "apiary", "deploy", "client", "/kit", "--data", "/data", \
    "--state", "/var/lib/apiary/state", "--port", "9094"]
