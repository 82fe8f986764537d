# A stand-in for rayproject/ray, which is only in a registry, on a Python base. What a Dockerfile or a container can tell
# is alike: user ray 1000:100, a Python of the user's own first on PATH, sudo without a password.
# Ray itself, CUDA's compiler and what else the real one brings are not here; train.lock installs Ray.
FROM base
RUN useradd --uid 1000 --gid 100 --create-home --home-dir /home/ray --shell /bin/bash ray \
    && echo 'ray ALL=NOPASSWD: ALL' > /etc/sudoers.d/ray
USER 1000
ENV HOME=/home/ray \
    PATH=/home/ray/anaconda3/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
WORKDIR /home/ray
# The first pip that builds a source by its build backend alone, as all later ones do; Debian's is older.
RUN python3 -m venv /home/ray/anaconda3 && pip install --no-cache-dir pip==25.3
