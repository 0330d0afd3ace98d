// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// pythonPackages is what Python's HTTP and TLS modules need at run time, and
// nothing for the terminal, databases or compressors.
var pythonPackages = []string{
	"libpython3.11-minimal", "libpython3.11-stdlib", "python3.11-minimal",
	"libc6", "libexpat1", "libffi8", "libssl3", "zlib1g",
}

func main() {
	out := flag.String("out", "build/images", "directory for busybox.tar and python.tar")
	cache := flag.String("cache", "build/debs", "directory that keeps the downloaded packages")
	flag.Parse()
	if err := run(*out, *cache); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(out, cache string) error {
	for _, dir := range []string{out, cache} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	debs, err := download(cache, append([]string{"busybox-static"}, pythonPackages...))
	if err != nil {
		return err
	}

	base, err := busyboxTree(debs["busybox-static"])
	if err != nil {
		return fmt.Errorf("busybox root: %w", err)
	}
	python, err := pythonTree(debs)
	if err != nil {
		return fmt.Errorf("python root: %w", err)
	}

	config := v1.Config{Env: []string{searchPath}, WorkingDir: "/", Cmd: []string{"sh"}}
	if err := write(out, "busybox.tar", "bulkhead.local/busybox:1", config, base); err != nil {
		return err
	}
	config.Cmd = []string{"python3"}
	config.Env = []string{searchPath, "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1"}
	return write(out, "python.tar", "bulkhead.local/python:3", config, base, python)
}

func write(dir, file, ref string, config v1.Config, layers ...*tree) error {
	start := time.Now()
	image, err := newImage(config, layers...)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	size, err := writeArchive(filepath.Join(dir, file), ref, image)
	if err != nil {
		return fmt.Errorf("archive %s: %w", file, err)
	}
	digest, err := image.Digest()
	if err != nil {
		return err
	}
	fmt.Printf("images: %s %s %.1f MiB %.1fs\n", ref, digest, float64(size)/(1<<20), time.Since(start).Seconds())
	return nil
}

// busyboxTree is a root with one static program that has every applet's name.
func busyboxTree(deb string) (*tree, error) {
	t := newTree()
	for _, dir := range []string{
		"dev", "etc", "home", "mnt", "opt", "proc", "run", "srv", "sys",
		"usr/bin", "usr/lib", "usr/lib64", "usr/local/bin", "usr/sbin", "usr/share", "var/log",
	} {
		t.dir(dir, 0o755)
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} {
		t.link(link, "usr/"+link)
	}
	t.link("var/run", "/run")
	t.dir("root", 0o700)
	t.dir("tmp", 0o1777)
	t.dir("var/tmp", 0o1777)
	t.dir("home/agent", 0o755)
	t.chown("home/agent", 1000, 1000)

	t.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"+
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"+
		"agent:x:1000:1000:agent:/home/agent:/bin/sh\n")
	t.file("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\nagent:x:1000:\n")
	t.file("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n")
	t.file("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n")
	t.file("etc/hostname", 0o644, "sandbox\n")
	t.file("etc/resolv.conf", 0o644, "")

	if err := t.addDeb(deb, func(name string) bool { return name == "usr/bin/busybox" }); err != nil {
		return nil, err
	}
	applets, err := appletNames(t.entries["usr/bin/busybox"].body)
	if err != nil {
		return nil, err
	}
	for _, applet := range applets {
		// usr/bin/sh and usr/sbin/ifconfig alike; both directories are on PATH.
		if name := "usr/" + strings.TrimPrefix(applet, "usr/"); t.entries[name] == nil {
			t.link(name, "/usr/bin/busybox")
		}
	}
	return t, nil
}

// appletNames asks the busybox in the package itself where its applets go.
func appletNames(program []byte) ([]string, error) {
	f, err := os.CreateTemp("", "busybox")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(program)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Chmod(f.Name(), 0o700)
	}
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(f.Name(), "--list-full")
	cmd.Args[0] = "busybox"
	list, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox applets: %w", err)
	}
	return strings.Fields(string(list)), nil
}

// pythonTree is the layer that goes above the busybox layer.
func pythonTree(debs map[string]string) (*tree, error) {
	t := newTree()
	for _, name := range pythonPackages {
		if err := t.addDeb(debs[name], wantedByPython); err != nil {
			return nil, err
		}
	}
	t.link("usr/bin/python3", "python3.11")
	t.link("usr/bin/python", "python3.11")
	return t, nil
}

// wantedByPython leaves out what a script that speaks HTTP never opens:
// documentation, character set converters, test modules and the extension
// modules whose libraries the image does not carry.
func wantedByPython(name string) bool {
	for _, prefix := range []string{
		"usr/share/", "usr/lib/binfmt.d/", "usr/lib/x86_64-linux-gnu/gconv/",
		"usr/lib/x86_64-linux-gnu/audit/", "usr/lib/x86_64-linux-gnu/perl",
	} {
		if strings.HasPrefix(name, prefix) {
			return false
		}
	}
	if module, ok := strings.CutPrefix(name, "usr/lib/python3.11/"); ok {
		dir, _, _ := strings.Cut(module, "/")
		switch dir {
		case "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo", "dbm", "curses", "sqlite3":
			return false
		}
	}
	extension, _, _ := strings.Cut(filepath.Base(name), ".cpython-")
	switch extension {
	case "_bz2", "_crypt", "_ctypes_test", "_curses", "_curses_panel", "_dbm", "_lzma", "_sqlite3", "_uuid",
		"_testbuffer", "_testcapi", "_testclinic", "_testimportmultiple", "_testinternalcapi", "_testmultiphase",
		"_xxtestfuzz", "nis", "ossaudiodev", "readline", "xxlimited", "xxlimited_35":
		return false
	}
	return true
}
