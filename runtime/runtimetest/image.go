// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// BusyboxRef is the name that BusyboxArchive gives its image.
const BusyboxRef = "docker.io/library/busybox:latest"

// Users of the busybox image beside root.
const (
	BusyboxUser    = "agent" // uid 1000, gid 1000, also in group tools
	BusyboxUserID  = 1000
	BusyboxToolsID = 2000
)

var busyboxOnce struct {
	sync.Mutex
	img v1.Image
}

// BusyboxImage makes an image of the machine's static busybox: all its applets
// in /bin, root and BusyboxUser in /etc/passwd, PATH set, and sh as its command.
func BusyboxImage(t testing.TB) v1.Image {
	t.Helper()
	path := need.Program(t, "busybox")
	busyboxOnce.Lock()
	defer busyboxOnce.Unlock()
	if busyboxOnce.img != nil {
		return busyboxOnce.img
	}
	img, err := makeBusybox(path)
	if err != nil {
		t.Fatalf("make busybox image: %v", err)
	}
	busyboxOnce.img = img
	return img
}

// BusyboxArchive answers BusyboxImage as an OCI archive named BusyboxRef.
func BusyboxArchive(t testing.TB) []byte {
	t.Helper()
	return OCIArchive(t, BusyboxImage(t), map[string]string{
		"io.containerd.image.name":          BusyboxRef,
		"org.opencontainers.image.ref.name": "latest",
	})
}

// OCIArchive answers an image as a tar of an OCI layout.
func OCIArchive(t testing.TB, img v1.Image, annotations map[string]string) []byte {
	t.Helper()
	dir := t.TempDir()
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.AppendImage(img, layout.WithAnnotations(annotations)); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	if err := tw.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// makeBusybox makes the image of the program at path, which must be static.
func makeBusybox(path string) (v1.Image, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, &fs.PathError{Op: "use", Path: path, Err: errNotStatic}
		}
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, err
	}
	layer, err := busyboxLayer(program, strings.Fields(string(list)))
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", goarch
	cfg.Config.Env = []string{"PATH=/bin:/usr/bin", "FROM_IMAGE=yes"}
	cfg.Config.Cmd = []string{"/bin/sh"}
	cfg.Config.WorkingDir = "/"
	return mutate.ConfigFile(img, cfg)
}

func busyboxLayer(program []byte, applets []string) (v1.Layer, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	epoch := time.Unix(0, 0)
	put := func(h tar.Header, body []byte) error {
		h.ModTime, h.Size = epoch, int64(len(body))
		if err := tw.WriteHeader(&h); err != nil {
			return err
		}
		_, err := tw.Write(body)
		return err
	}
	dir := func(name string, mode int64) error {
		return put(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, nil)
	}
	file := func(name string, mode int64, body string) error {
		return put(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, []byte(body))
	}
	for _, d := range []string{"bin/", "dev/", "etc/", "home/", "home/agent/", "proc/", "root/", "run/", "sys/", "usr/", "usr/bin/", "var/"} {
		if err := dir(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := dir("tmp/", 0o1777); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		name string
		mode int64
		body string
	}{
		{"bin/busybox", 0o755, string(program)},
		{"bin/notaprogram", 0o644, "nothing\n"},
		{"etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000:agent:/home/agent:/bin/sh\n"},
		{"etc/group", 0o644, "root:x:0:\nagent:x:1000:\ntools:x:2000:agent\n"},
		{"run/from-image", 0o644, "yes\n"},
	} {
		if err := file(f.name, f.mode, f.body); err != nil {
			return nil, err
		}
	}
	// A device node that an image brings must be of no use: this one is the
	// kernel's memory.
	if err := put(tar.Header{Typeflag: tar.TypeChar, Name: "var/mem", Mode: 0o666, Devmajor: 1, Devminor: 1}, nil); err != nil {
		return nil, err
	}
	for _, a := range applets {
		if a == "busybox" {
			continue
		}
		if err := put(tar.Header{Typeflag: tar.TypeSymlink, Name: filepath.Join("bin", filepath.Base(a)), Linkname: "busybox", Mode: 0o777}, nil); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	})
}
