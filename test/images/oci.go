// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func newImage(config v1.Config, layers ...*tree) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.ConfigFile(image, &v1.ConfigFile{
		OS: "linux", Architecture: "amd64", Created: v1.Time{Time: time.Unix(0, 0).UTC()}, Config: config,
		RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, err
	}
	for _, t := range layers {
		var body bytes.Buffer
		if err := t.writeTar(&body); err != nil {
			return nil, err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(body.Bytes())), nil
		}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
		if err != nil {
			return nil, err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return nil, err
		}
	}
	return image, nil
}

// writeArchive writes an OCI layout as a tar that containerd imports under the
// name ref, and answers its size.
func writeArchive(file, ref string, image v1.Image) (int64, error) {
	dir, err := os.MkdirTemp(filepath.Dir(file), ".layout")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return 0, err
	}
	// The first is containerd's own name for it; the second is OCI's.
	names := layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          ref,
		"org.opencontainers.image.ref.name": ref,
	})
	if err := l.AppendImage(image, names); err != nil {
		return 0, err
	}
	archive, err := packDir(dir)
	if err != nil {
		return 0, err
	}
	tmp := file + ".new"
	if err := os.WriteFile(tmp, archive, 0o644); err != nil {
		return 0, err
	}
	return int64(len(archive)), os.Rename(tmp, file)
}

func packDir(dir string) ([]byte, error) {
	t := newTree()
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		body, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		t.add(rel, &entry{kind: tar.TypeReg, mode: 0o644, body: body})
		return nil
	})
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = t.writeTar(&out)
	return out.Bytes(), err
}
