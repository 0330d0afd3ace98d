// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestMergedUsr(t *testing.T) {
	for in, want := range map[string]string{
		"./":                          "",
		"./bin/busybox":               "usr/bin/busybox",
		"./lib/x86_64-linux-gnu/libc": "usr/lib/x86_64-linux-gnu/libc",
		"./lib64/ld.so":               "usr/lib64/ld.so",
		"./usr/lib/python3.11/os.py":  "usr/lib/python3.11/os.py",
		"./library":                   "library",
	} {
		if got := mergedUsr(in); got != want {
			t.Errorf("mergedUsr(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestTreeWritesParentsFirst(t *testing.T) {
	tr := newTree()
	tr.file("a/b/c", 0o640, "hello")
	tr.dir("a-b", 0o1777)
	var buf bytes.Buffer
	if err := tr.writeTar(&buf); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for archive := tar.NewReader(&buf); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Clean(header.Name)
		if parent := filepath.Dir(name); parent != "." && !seen[parent] {
			t.Errorf("%s comes before its parent", name)
		}
		if header.ModTime.Unix() != 0 {
			t.Errorf("%s has time %v, want 1970", name, header.ModTime)
		}
		seen[name] = true
	}
	if len(seen) != 4 {
		t.Errorf("got %d entries, want 4: %v", len(seen), seen)
	}
}

func TestSameTreeSameBytes(t *testing.T) {
	var got [2][]byte
	for i := range got {
		tr := newTree()
		for _, name := range []string{"etc/passwd", "bin/sh", "tmp/x"} {
			tr.file(name, 0o644, name)
		}
		image, err := newImage(v1.Config{Cmd: []string{"sh"}}, tr)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "image.tar")
		if _, err := writeArchive(file, "bulkhead.local/test:1", image); err != nil {
			t.Fatal(err)
		}
		if got[i], err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got[0], got[1]) {
		t.Error("two archives of the same tree differ")
	}
}
