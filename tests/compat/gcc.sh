# what: gcc and make: a C project of several files with a library, threads and openmp, in parallel, linked both ways
# packages: gcc make libc6-dev binutils
mkdir -p p
cd p
for i in 1 2 3 4 5 6; do printf 'int f%s(int x) { return x + %s; }\n' $i $i >f$i.c; done
cat >main.c <<'END'
#include <pthread.h>
#include <stdio.h>
int f1(int), f2(int), f3(int), f4(int), f5(int), f6(int);
static void *run(void *p) { *(int *)p = f1(f2(f3(f4(f5(f6(0)))))); return 0; }
int main(void) { pthread_t t; int r; pthread_create(&t, 0, run, &r); pthread_join(t, 0); int s = 0;
#pragma omp parallel for reduction(+:s)
for (int i = 0; i < 100; i++) s += i;
printf("%d %d\n", r, s); return 0; }
END
cat >Makefile <<'END'
CFLAGS = -O2 -g -fopenmp -flto -fstack-protector-strong
all: dynamic static shared
objects = f1.o f2.o f3.o f4.o f5.o f6.o
libf.a: $(objects); ar rcs $@ $^
dynamic: main.o libf.a; gcc $(CFLAGS) -o $@ $^
static: main.o libf.a; gcc $(CFLAGS) -static -o $@ $^
libg.so: ; gcc -shared -fPIC -o $@ f*.c
shared: main.o libg.so; gcc $(CFLAGS) -o $@ main.o -L. -lg -Wl,-rpath,.
END
make -j4 >log 2>&1 || { tail -n 5 log; exit 1; }
for b in dynamic static shared; do [ "$(./$b)" = "21 4950" ]; done
