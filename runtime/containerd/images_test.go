// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/runtimetest"
)

// variant answers a busybox image with one more layer, so that its digests are
// its own.
func variant(t testing.TB, tag string) v1.Image {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	body := []byte(tag + "\n")
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "variant", Mode: 0o644, Size: int64(len(body))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(body); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(runtimetest.BusyboxImage(t), layer)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// wantVariant runs an image and looks whether it is the one.
func wantVariant(t testing.TB, r *Runtime, image, tag string) {
	t.Helper()
	s := newSpec(t, r, "cat", "/variant")
	s.Image = image
	if _, out, errs := runOut(t, r, s); out != tag+"\n" {
		t.Errorf("%s: got %q%s, want %q", image, out, errs, tag)
	}
}

func importNames(t testing.TB, r *Runtime, b []byte) []string {
	t.Helper()
	imgs, err := r.Import(t.Context(), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, img := range imgs {
		if img.SizeBytes <= 0 || !strings.HasPrefix(img.Digest, "sha256:") {
			t.Errorf("got %+v", img)
		}
		names = append(names, img.Name)
		t.Cleanup(func() {
			if err := r.client.ImageService().Delete(context.Background(), img.Name, images.SynchronousDelete()); err != nil && !isNotFound(err) {
				t.Error(err)
			}
		})
	}
	return names
}

func zipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	if _, err := zw.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestImportFormats(t *testing.T) {
	r := start(t)
	dockerTag, err := name.NewTag("variant:docker")
	if err != nil {
		t.Fatal(err)
	}
	var docker bytes.Buffer
	if err := tarball.Write(dockerTag, variant(t, "docker"), &docker); err != nil {
		t.Fatal(err)
	}
	bare := variant(t, "bare")
	bareDigest, err := bare.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		tag     string
		archive []byte
		name    string
		finds   string
	}{
		{"oci", runtimetest.OCIArchive(t, variant(t, "oci"), map[string]string{"io.containerd.image.name": "docker.io/library/variant:oci"}), "docker.io/library/variant:oci", "variant:oci"},
		{"refname", runtimetest.OCIArchive(t, variant(t, "refname"), map[string]string{"org.opencontainers.image.ref.name": "example.com/variant:refname"}), "example.com/variant:refname", "example.com/variant:refname"},
		{"bare", runtimetest.OCIArchive(t, bare, map[string]string{"org.opencontainers.image.ref.name": "latest"}), bareDigest.String(), bareDigest.String()},
		{"gzip", zipped(t, runtimetest.OCIArchive(t, variant(t, "gzip"), map[string]string{"io.containerd.image.name": "variant:gzip"})), "variant:gzip", "variant:gzip"},
		{"docker", docker.Bytes(), "docker.io/library/variant:docker", "variant:docker"},
	} {
		t.Run(c.tag, func(t *testing.T) {
			if names := importNames(t, r, c.archive); len(names) != 1 || names[0] != c.name {
				t.Fatalf("names: got %v, want %s", names, c.name)
			}
			wantVariant(t, r, c.finds, c.tag)
		})
	}
}

// TestImportReplaces: a name moves to the new image, and only when that is
// whole.
func TestImportReplaces(t *testing.T) {
	r := start(t)
	named := map[string]string{"io.containerd.image.name": "docker.io/library/variant:moves"}
	importNames(t, r, runtimetest.OCIArchive(t, variant(t, "old"), named))
	wantVariant(t, r, "variant:moves", "old")
	next := runtimetest.OCIArchive(t, variant(t, "new"), named)
	if _, err := r.Import(t.Context(), bytes.NewReader(next[:len(next)-8<<10])); !errors.Is(err, runtime.ErrInvalidArchive) {
		t.Errorf("got %v", err)
	}
	wantVariant(t, r, "variant:moves", "old")
	importNames(t, r, next)
	wantVariant(t, r, "variant:moves", "new")
}

// store answers the digests of all content, all ingests, and all snapshots.
func store(t testing.TB, r *Runtime) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	cs := r.client.ContentStore()
	if err := cs.Walk(t.Context(), func(i content.Info) error {
		all[i.Digest.String()] = true
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	ingests, err := cs.ListStatuses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range ingests {
		all["ingest "+i.Ref] = true
	}
	if err := r.snapshots.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		all["snapshot "+i.Name] = true
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	imgs, err := r.client.ImageService().List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range imgs {
		all["image "+i.Name] = true
	}
	return all
}

// TestImportLeavesNothing: a damaged archive, wherever the damage is, leaves no
// byte in the store.
func TestImportLeavesNothing(t *testing.T) {
	r := start(t)
	named := map[string]string{"io.containerd.image.name": "docker.io/library/variant:damaged"}
	whole := runtimetest.OCIArchive(t, variant(t, "damaged"), named)
	garbage := static.NewLayer([]byte("this is not a layer"), types.OCILayer)
	broken, err := mutate.AppendLayers(variant(t, "broken"), garbage)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := mutate.ConfigFile(variant(t, "foreign"), &v1.ConfigFile{OS: "linux", Architecture: "s390x"})
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Replace(whole, []byte(`"rootfs"`), []byte(`"rootfS"`), 1)
	gz := zipped(t, whole)
	badSum := bytes.Clone(gz)
	badSum[len(badSum)-6] ^= 1
	before := store(t, r)
	for name, b := range map[string][]byte{
		"first tenth":       whole[:len(whole)/10],
		"half":              whole[:len(whole)/2],
		"last blob":         whole[:len(whole)-6<<10],
		"gzip, half":        gz[:len(gz)/2],
		"gzip, no sum":      gz[:len(gz)-4],
		"gzip, bad sum":     badSum,
		"gzip, head only":   gz[:5],
		"one bit":           flipped,
		"layer is no tar":   runtimetest.OCIArchive(t, broken, named),
		"other platform":    runtimetest.OCIArchive(t, foreign, named),
		"tar, not an image": tarOf(t, map[string]string{"hello": "world"}),
		"layout, no index":  tarOf(t, map[string]string{"oci-layout": `{"imageLayoutVersion":"1.0.0"}`}),
		"index, no blobs":   tarOf(t, map[string]string{"oci-layout": `{"imageLayoutVersion":"1.0.0"}`, "index.json": `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + d + `","size":2}]}`}),
		"index is no JSON":  tarOf(t, map[string]string{"oci-layout": `{"imageLayoutVersion":"1.0.0"}`, "index.json": `{`}),
	} {
		_, err := r.Import(t.Context(), bytes.NewReader(b))
		if !errors.Is(err, runtime.ErrInvalidArchive) {
			t.Errorf("%s: got %v, want invalid archive", name, err)
		}
		for k := range store(t, r) {
			if !before[k] {
				t.Errorf("%s: left %s", name, k)
			}
		}
	}
}

func tarOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for name, body := range files {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestImportAtOnce(t *testing.T) {
	r := start(t)
	var wg sync.WaitGroup
	for i := range 4 {
		tag := fmt.Sprintf("once%d", i/2) // every archive twice
		b := runtimetest.OCIArchive(t, variant(t, tag), map[string]string{"io.containerd.image.name": "docker.io/library/variant:" + tag})
		wg.Go(func() {
			if _, err := r.Import(t.Context(), bytes.NewReader(b)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range 2 {
		tag := fmt.Sprintf("once%d", i)
		wantVariant(t, r, "variant:"+tag, tag)
		if err := r.client.ImageService().Delete(t.Context(), "docker.io/library/variant:"+tag); err != nil {
			t.Error(err)
		}
	}
}

func newRegistry(t testing.TB) string {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func TestPull(t *testing.T) {
	r := start(t)
	host := newRegistry(t)
	ref := host + "/team/variant:pulled"
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	want := variant(t, "pulled")
	if err := remote.Write(tag, want); err != nil {
		t.Fatal(err)
	}
	img, err := r.Pull(t.Context(), ref, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.client.ImageService().Delete(context.Background(), img.Name) })
	digest, err := want.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if img.Name != ref || img.Digest != digest.String() {
		t.Errorf("got %+v", img)
	}
	wantVariant(t, r, ref, "pulled")

	if _, err := r.Pull(t.Context(), host+"/team/variant:nosuch", true); !errors.Is(err, runtime.ErrImageNotFound) {
		t.Errorf("missing tag: got %v", err)
	}
	if _, err := r.Pull(t.Context(), ref, false); err == nil || errors.Is(err, runtime.ErrImageNotFound) {
		t.Errorf("TLS to a plain registry: got %v", err)
	}
	if _, err := r.Pull(t.Context(), "127.0.0.1:1/x:y", true); err == nil || errors.Is(err, runtime.ErrImageNotFound) {
		t.Errorf("no registry: got %v", err)
	}
	if _, err := r.Pull(t.Context(), "No Name", true); err == nil {
		t.Error("a bad name is pulled")
	}
}

// TestCreateUnpacks: an image that somebody else has fetched is unpacked when
// it is first used.
func TestCreateUnpacks(t *testing.T) {
	r := start(t)
	img := variant(t, "fetched")
	b := runtimetest.OCIArchive(t, img, map[string]string{"io.containerd.image.name": "docker.io/library/variant:fetched"})
	if _, err := r.client.Import(t.Context(), bytes.NewReader(b), client.WithAllPlatforms(true)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = r.client.ImageService().Delete(context.Background(), "docker.io/library/variant:fetched")
	})
	wantVariant(t, r, "variant:fetched", "fetched")
}

func TestImageGone(t *testing.T) {
	r := start(t)
	importNames(t, r, runtimetest.OCIArchive(t, variant(t, "gone"), map[string]string{"io.containerd.image.name": "docker.io/library/variant:gone"}))
	s := newSpec(t, r, "sleep", "1000")
	s.Image = "variant:gone"
	task := launch(t, r, s)
	if err := r.client.ImageService().Delete(t.Context(), "docker.io/library/variant:gone", images.SynchronousDelete()); err != nil {
		t.Fatal(err)
	}
	// What runs keeps its files.
	if code, out := execOut(t, task, runtime.ExecSpec{Command: []string{"cat", "/variant"}}); code != 0 || out != "gone\n" {
		t.Errorf("got exit %d, %q", code, out)
	}
	again := newSpec(t, r, "true")
	again.Image = "variant:gone"
	if _, err := r.Create(t.Context(), again); !errors.Is(err, runtime.ErrImageNotFound) {
		t.Errorf("got %v", err)
	}
}
